"""A cluster that begins as a head alone: each command gets the machines that it asks for, and they go when it is gone.

Ray's own autoscaler, as `ray up` starts it, with real raylets; only the machines are processes of this one.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from farm_parts import tiny_with_statistics
from job_parts import JobServer, job_server
from training_parts import flags_of, quick_flags, when, write_toy_dataset

from spvla import runs
from spvla.eval.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = {"object_store_memory": 100 << 20}
KINDS = {
    "policy": {"resources": {"CPU": 2, "spvla_policy": 1000, **SMALL}, "min_workers": 0, "max_workers": 2},
    "env": {"resources": {"CPU": 1, "spvla_env": 1000, **SMALL}, "min_workers": 0, "max_workers": 3},
}


@pytest.fixture(scope="module")
def server() -> Iterator[JobServer]:
    with job_server(num_cpus=0, kinds=KINDS) as started:
        yield started


def state(server: JobServer) -> str:
    return server.ray("status", "--address", server.address).stdout


def machines(server: JobServer) -> dict[str, int]:
    """How many of each kind run, busy or not."""
    nodes = state(server).split("Pending:")[0]
    return {kind: sum(map(int, re.findall(rf"^ (\d+) {kind}$", nodes, re.M))) for kind in KINDS}


def at_rest(server: JobServer) -> bool:
    """The head alone, and nobody asks for anything."""
    now = state(server)
    quiet = "(no resource demands)" in now and "(no pending nodes)" in now
    return quiet and machines(server) == dict.fromkeys(KINDS, 0)


@contextmanager
def driver(server: JobServer, *command: str) -> Iterator[subprocess.Popen[str]]:
    """A command on the head, which is ended with the test."""
    environment = server.environment | {"RAY_ADDRESS": server.address}
    line = [sys.executable, "-m", "spvla.cli", *command]
    with subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def output(server: JobServer, *command: str) -> str:
    with driver(server, *command) as running:
        said, _ = running.communicate(timeout=600)
    assert running.returncode == 0, said
    return said


def evaluation(tmp_path: Path, *flags: str) -> list[str]:
    policy = tiny_with_statistics(tmp_path / "policy")
    suite = ("--task_suite_name", "libero_object", "--tasks", "[0]", "--max_steps", "5")
    logs = ("--local_log_dir", str(tmp_path / "logs"))
    return ["evaluate", "--pretrained_checkpoint", str(policy), *suite, *logs, *flags]


def test_an_evaluation_gets_its_machines_and_lets_them_go(server: JobServer, tmp_path: Path) -> None:
    when(lambda: at_rest(server), timeout_s=300)
    with driver(server, *evaluation(tmp_path, "--num_envs", "2", "--num_trials_per_task", "4")) as running:
        when(lambda: machines(server) == {"policy": 1, "env": 2} or running.poll() is not None, timeout_s=300)
        said, _ = running.communicate(timeout=300)
    assert running.returncode == 0, said
    with Ledger.open(tmp_path / "logs" / runs.LEDGER) as ledger:
        assert {row.worker for row in ledger.trials()} == {"env-0", "env-1"}
        assert len(ledger.outcomes()) == 4 and ledger.errors() == []
    when(lambda: at_rest(server), timeout_s=300)


def test_a_killed_evaluation_asks_for_nothing_more(server: JobServer, tmp_path: Path) -> None:
    with driver(server, *evaluation(tmp_path, "--num_envs", "3", "--num_trials_per_task", "50")) as running:
        when(lambda: any(machines(server).values()), timeout_s=300)
        os.kill(running.pid, signal.SIGKILL)
    when(lambda: at_rest(server), timeout_s=300)


def test_training_gets_its_machines(server: JobServer, tmp_path: Path) -> None:
    write_toy_dataset(tmp_path / "data")
    config = quick_flags(tmp_path / "data", tmp_path / "runs", run_id="a", num_workers=4)
    output(server, "train", *flags_of(config))
    assert runs.checkpoints(tmp_path / "runs" / "a")[-1][0] == config.max_steps


def test_a_sweeps_trials_get_their_machines(server: JobServer, tmp_path: Path) -> None:
    write_toy_dataset(tmp_path / "data")
    config = quick_flags(tmp_path / "data", tmp_path / "runs", run_id="s", num_workers=2)
    swept = ("--beta", "0.1,0.5", "--metric", "val_action_accuracy")
    said = output(server, "sweep", *flags_of(config), *swept)
    assert said.count(" done") == 2, said
    when(lambda: at_rest(server), timeout_s=300)
