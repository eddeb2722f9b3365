"""One place connects to Ray, and nothing else does."""

import os
import subprocess
import sys
import time

import pytest

from spvla.cluster.connect import explained

AFTERWARDS = """
import ray
from spvla.cluster.connect import connection
with connection(num_cpus=1):
    assert ray.get(ray.put(1)) == 1
try:
    ray.put(2)
except ray.exceptions.RaySystemError as e:
    print("refused:", e)
assert not ray.is_initialized()
"""


def test_a_call_after_the_connection_starts_no_cluster_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", AFTERWARDS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "refused: " in done.stdout


CONNECT = """
from spvla.cluster.connect import connection
from spvla.errors import ClusterError
try:
    with connection(num_cpus=1):
        print("connected")
except ClusterError as e:
    print(e)
"""


def said_with(**environment: str) -> str:
    """What a command would say on one line, in a process with these variables."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | environment
    done = subprocess.run([sys.executable, "-c", CONNECT], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"RAY_TMPDIR": "/tmp/" + "x" * 80}, "a shorter folder"),
        ({"RAY_TMPDIR": "/dev/null/ray"}, "a folder of this user's own in RAY_TMPDIR"),
        ({"RAY_ADDRESS": "http://127.0.0.1:8265"}, "RAY_API_SERVER_ADDRESS"),
        ({"RAY_ADDRESS": "127.0.0.1:9"}, "nobody answers at RAY_ADDRESS=127.0.0.1:9"),
        ({"RAY_ADDRESS": "ray://127.0.0.1:9"}, "nobody answers"),
        ({"RAY_ADDRESS": "nonsense"}, "Correct or unset RAY_ADDRESS"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "auth_token"),
    ],
)
def test_what_keeps_ray_from_starting_is_one_line_with_its_remedy(environment: dict[str, str], wanted: str) -> None:
    started_s = time.monotonic()
    said = said_with(**environment)
    assert wanted in said and len(said.splitlines()) == 1
    assert time.monotonic() - started_s < 40  # Ray alone would try a dead address for minutes


def test_a_cluster_of_another_version_is_told_whole() -> None:
    lines = ["Version mismatch: The cluster was started with:", "    Ray: 2.40.0", "    Python: 3.10.1", "This process"]
    e = explained(RuntimeError("\n".join(lines)), "10.0.0.1:6379")
    assert "Ray: 2.40.0 Python: 3.10.1" in str(e) and "Install on this machine" in e.remedy
