"""`spvla serve` as a process of its own, asked by a farm on real Ray and by openpi's own client."""

import os
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeEnv
from farm_parts import SUITE, fake_farm, job, open_ledger, tiny_with_statistics, trials

from spvla.config import EvaluateConfig, FarmConfig
from spvla.eval.actors import open_base
from spvla.eval.driver import Driver
from spvla.eval.episode import run_trial
from spvla.eval.messages import ELSEWHERE
from spvla.eval.plan import describe_external, unnorm_key
from spvla.policies.registry import load_policy
from spvla.policies.remote import Connection

pytestmark = pytest.mark.slow
KEY = f"{SUITE}_no_noops"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_with_statistics(tmp_path_factory.mktemp("policies") / "tiny")


def start(checkpoint: Path, port: int) -> subprocess.Popen:
    flags = ["--pretrained_checkpoint", str(checkpoint), "--port", str(port), "--unnorm_key", KEY]
    return subprocess.Popen([sys.executable, "-m", "spvla.cli", "serve", *flags])


@contextmanager
def served(checkpoint: Path) -> Iterator[str]:
    port = free_port()
    process = start(checkpoint, port)
    try:
        Connection(f"ws://127.0.0.1:{port}", wait_s=120).close()
        yield f"ws://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Flicker(FakeEnv):
    """Every state looks different, and every part of an action moves it."""

    def image(self, camera: str = "agentview") -> np.ndarray:
        rng = np.random.default_rng(np.float64(self.x).view(np.uint64))
        return np.kron(rng.integers(0, 256, (16, 16, 3), np.uint8), np.ones((16, 16, 1), np.uint8))

    def step(self, action: np.ndarray) -> bool:
        self.x += float(action @ [1, 2, 3, 4, 5, 6, 7])
        time.sleep(0.02)
        return False


def flicker(suite: str, task: int) -> FakeEnv:
    return Flicker()


@pytest.mark.usefixtures("ray_cluster")
def test_a_server_that_is_killed_and_restarted_costs_errors_and_no_outcome(tiny: Path, tmp_path: Path) -> None:
    """The same outcomes as those of the same checkpoint without a server."""
    port = free_port()
    process = start(tiny, port)
    Connection(f"ws://127.0.0.1:{port}", wait_s=120).close()
    version = describe_external(EvaluateConfig(policy_server=f"ws://127.0.0.1:{port}"))
    assert version.name == "tiny" and unnorm_key(version, SUITE, None) == SUITE
    wanted = trials(tasks=1, init_states=6, versions=[version])
    config = FarmConfig(num_envs=2, num_videos=0, max_failure_videos=0, call_timeout_s=60)
    kind = {"device": ELSEWHERE, "decode_batch_size": 0, "max_batch": 1, "under_way": 2}
    killed = []

    def upheaval(driver: Driver) -> None:
        nonlocal process
        if driver.made >= 2 and not killed:
            killed.append(process)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = start(tiny, port)

    farm_of = fake_farm(tmp_path, config, open_env=flicker, load=open_base, versions=[version], serving=kind)
    try:
        with open_ledger(tmp_path, wanted, [version]) as ledger, farm_of as (farm, said):
            Driver(farm, job(wanted, steps=40), ledger).play(upheaval)
            rows, errors = ledger.trials(), ledger.errors()
    finally:
        process.kill()
    assert killed and [row.status for row in rows] == ["failure"] * 6 and 1 <= len(errors) <= 4
    assert {e.kind for e in errors} <= {"policy actor gone", "policy actor raised"}
    assert any("started again" in line for line in said)

    direct, alone = load_policy(tiny, decode_batch_size=1), Flicker()
    for row in rows[:2]:
        outcome = run_trial(
            alone,
            lambda seen: direct.act([seen], unnorm_key=KEY)[0],
            row.trial,
            needs=direct.needs,
            num_steps_wait=0,
            center_crop=True,
            max_steps=40,
        )
        assert row.state_digest == outcome.state_digest


def test_openpis_own_client_plays_with_our_server(tiny: Path, tmp_path: Path) -> None:
    """It wants numpy below 2, so it lives in an environment of its own."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    wanted = ["openpi-client==0.1.2", "numpy<2", "msgpack", "websockets", "pillow", "typing_extensions"]
    for line in (["--no-deps", "dm-tree", wanted[0]], [*wanted[1:], "absl-py", "attrs", "wrapt"]):
        done = subprocess.run([python, "-m", "pip", "install", "-q", *line], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"openpi-client cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    script = """
import sys, numpy as np
from openpi_client import image_tools, websocket_client_policy
client = websocket_client_policy.WebsocketClientPolicy(host=sys.argv[1])
frame = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
image = image_tools.convert_to_uint8(image_tools.resize_with_pad(frame, 224, 224))
seen = {"observation/image": image, "observation/wrist_image": image, "observation/state": np.zeros(8)}
first, again = (client.infer({**seen, "prompt": "pick up the milk"})["actions"] for _ in range(2))
assert first.shape == (1, 7) and np.array_equal(first, again) and abs(first[0, 6]) in (0, 1), first
print(client.get_server_metadata()["spvla"]["name"])
"""
    with served(tiny) as url:
        done = subprocess.run(
            [python, "-c", script, url],
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
    assert done.stdout.strip() == "tiny", done.stderr
