"""Chaos: real environments and a real (tiny) policy, while everything is killed in turn; the table stays the same.

The driver runs as a person starts it, in a process of its own, and the deaths come from outside.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from farm_parts import tiny_with_statistics

from spvla.eval.ledger import Ledger

TASKS, TRIALS = "[0, 1]", 3
SIGNALS = [signal.SIGKILL, signal.SIGFPE, signal.SIGSEGV, signal.SIGSTOP]  # the last one hangs


def start(log_dir: Path, checkpoint: Path, *, num_envs: int) -> subprocess.Popen:
    flags = {
        "pretrained_checkpoint": checkpoint,
        "task_suite_name": "libero_object",
        "tasks": TASKS,
        "num_trials_per_task": TRIALS,
        "local_log_dir": log_dir,
        "num_envs": num_envs,
        "decode_batch_size": 2,
        "max_steps": 40,
        "num_steps_wait": 2,
        "max_retries": 1000,
        "call_timeout_s": 30,
        "max_failure_videos": 1,
    }
    words = [str(w) for flag, value in flags.items() for w in (f"--{flag}", value)]
    log = (log_dir.parent / f"{log_dir.name}.out").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "spvla.cli", "evaluate", *words],
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def processes(log_dir: Path, name: str) -> list[int]:
    """The latest process of each actor whose name begins so, from its log."""
    found = []
    for log in sorted((log_dir / "workers").glob(f"{name}-*.log")):
        if pids := re.findall(r"^--- process (\d+)", log.read_text(errors="replace"), re.M):
            found.append(int(pids[-1]))
    return [pid for pid in found if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def group_of(session: int) -> list[int]:
    """Every process of a session: Ray's own and the actors among them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            found.append(int(stat.parent.name))
    return found


def done(log_dir: Path) -> int:
    if not (log_dir / "ledger.sqlite").exists():
        return 0
    with Ledger.open(log_dir / "ledger.sqlite") as ledger:
        return len(ledger.outcomes())


def wait_until(what: str, condition: object, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s until {what}"
        time.sleep(0.1)


def table(log_dir: Path) -> list[tuple]:
    with Ledger.open(log_dir / "ledger.sqlite") as ledger:
        rows = ledger.trials()
    return [(r.policy, r.protocol, r.task, r.init_state, r.status, r.steps, r.state_digest, r.note) for r in rows]


def test_ctrl_c_leaves_no_process_no_claim_and_a_run_that_goes_on(tmp_path: Path) -> None:
    checkpoint, logs = tiny_with_statistics(tmp_path / "tiny"), tmp_path / "logs"
    driver = start(logs, checkpoint, num_envs=2)
    wait_until("a trial is on its way", lambda: len(processes(logs, "env")) == 2 and processes(logs, "policy"))
    time.sleep(1)
    everyone = group_of(driver.pid) + processes(logs, "env") + processes(logs, "policy")
    os.killpg(driver.pid, signal.SIGINT)  # what a terminal sends
    assert driver.wait(timeout=60) == 130
    wait_until("everyone is gone", lambda: not any(map(alive, everyone)), timeout_s=30)
    said = (tmp_path / "logs.out").read_text()
    assert "interrupted; the same command goes on from here" in said and "Traceback" not in said
    with Ledger.open(logs / "ledger.sqlite") as ledger:
        for row in ledger.trials():
            assert row.status is not None or ledger.claim(row.protocol, row.trial)


@pytest.mark.slow
def test_a_lost_node_costs_no_trial(tmp_path: Path) -> None:
    """Its own process, since a process has one Ray: head without CPUs for environments, two nodes with, one removed."""
    script = Path(__file__).with_name("node_loss.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12 of 12 outcomes, as they must be" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whatever_is_killed_the_table_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    checkpoint = tiny_with_statistics(tmp_path / "tiny")
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    assert start(calm, checkpoint, num_envs=2).wait(timeout=300) == 0

    driver = start(wild, checkpoint, num_envs=3)
    rng, signals = random.Random(0), list(SIGNALS)
    for victim in ["env", "env", "env", "env", "policy", "env"]:
        wait_until(f"{victim} runs", lambda v=victim: processes(wild, v))
        time.sleep(rng.uniform(1, 3))
        assert driver.poll() is None, "the driver ended early"
        kind = signals.pop(0) if signals and victim == "env" else signal.SIGKILL
        if pids := processes(wild, victim):
            os.kill(rng.choice(pids), kind)
    wait_until("an outcome is there", lambda: done(wild) >= 1)
    workers = processes(wild, "env") + processes(wild, "policy")
    driver.kill()
    driver.wait()
    wait_until("its workers are gone", lambda: not any(map(alive, workers)), timeout_s=60)
    before = done(wild)
    assert start(wild, checkpoint, num_envs=2).wait(timeout=300) == 0

    assert len(table(calm)) == 6 and all(row[4] for row in table(calm))
    assert table(wild) == table(calm)
    said = (tmp_path / "wild.out").read_text()
    assert "environment died" in said and "(raylet" not in said
    print(f"{before} of 6 outcomes were there before the driver was killed")
