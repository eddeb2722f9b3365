"""One place connects to Ray, and nothing else does."""

import subprocess
import sys

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
