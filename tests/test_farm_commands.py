"""The farm's longer stories through the commands themselves, each in a process of its own as a person starts it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from farm_parts import adapter_of, tiny_with_statistics
from training_parts import flags_of, quick_flags, when, write_toy_dataset

from spvla import runs
from spvla.data.index import ensure_index
from spvla.eval.ledger import Ledger

SUITE = "libero_object"
SHORT = {"task_suite_name": SUITE, "tasks": "[0]", "num_envs": 2, "max_steps": 5, "num_steps_wait": 1, "num_videos": 0}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def spvla(command: str, words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "spvla.cli", command, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def evaluate(**flags: object) -> subprocess.Popen:
    words = (SHORT | {"max_failure_videos": 0} | flags).items()
    return spvla("evaluate", [str(word) for name, value in words for word in (f"--{name}", value)])


def done(log_dir: Path) -> dict[str, int]:
    """Trials with an outcome, by policy."""
    if not (log_dir / runs.LEDGER).exists():
        return {}
    with Ledger.open(log_dir / runs.LEDGER) as ledger:
        names = [row.policy_name for row in ledger.trials() if row.status is not None]
    return {name: names.count(name) for name in names}


def test_each_new_checkpoint_is_evaluated_while_training_goes_on(tmp_path: Path) -> None:
    dataset, logs = f"{SUITE}_no_noops", tmp_path / "logs"
    write_toy_dataset(tmp_path / "data", name=dataset)
    ensure_index(tmp_path / "data", dataset)
    config = quick_flags(
        tmp_path / "data", tmp_path / "runs", dataset_name=dataset, run_id="a", max_steps=200, save_steps=50
    )
    training = spvla("train", flags_of(config))
    run = tmp_path / "runs/a"
    when(lambda: (run / runs.CONFIG).exists() or training.poll() is not None)
    following = evaluate(
        follow=run, num_trials_per_task=2, local_log_dir=logs, use_wandb=True, wandb_mode="offline", num_envs=1
    )
    when(lambda: bool(done(logs)) or following.poll() is not None)
    assert training.poll() is None, "training ended before any outcome was there"
    assert training.wait() == 0, training.stderr.read()[-3000:]
    out, said = following.communicate()
    assert following.returncode == 0, said[-3000:]

    names = [f"a/{runs.checkpoint_name(step)}" for step in (50, 100, 150, 200)]
    assert done(logs) == dict.fromkeys(names, 2)
    assert all(f"{name}  {SUITE}" in out for name in names)
    assert len(list(logs.glob("EVAL-*.txt"))) == 4
    assert {step for step, _ in runs.checkpoints(run)} == {200}  # training kept its newest alone

    pinned = {file.name for file in (logs / "followed").rglob("*") if file.is_file()}
    assert pinned == {"adapter_model.safetensors", "adapter_config.json", "dataset_statistics.json"}
    for log in (logs / "workers").iterdir():
        assert len(re.findall("^--- process", log.read_text(), re.M)) == 1, f"{log.name}: started again"

    (book,) = logs.glob("wandb/offline-run-*")
    tables = [json.loads(path.read_text())["data"] for path in book.glob("files/media/table/*.json")]
    assert sorted(rows[0][0] for rows in tables) == names
    assert b"checkpoint_step" in next(book.glob("*.wandb")).read_bytes()


def test_a_settled_comparison_stops_early_says_so_and_is_not_taken_up_again(tmp_path: Path) -> None:
    tiny, logs = tiny_with_statistics(tmp_path / "tiny"), tmp_path / "logs"
    other = adapter_of(tiny, tmp_path / "other", seed=1)
    flags = {
        "pretrained_checkpoint": f"{tiny},{other}",
        "num_trials_per_task": 9,
        "local_log_dir": logs,
        "stop_when_settled": True,
    }
    first = evaluate(**flags)
    out, said = first.communicate()
    assert first.returncode == 0, said[-3000:]
    (words,) = [line for line in said.splitlines() if "settled after" in line]
    both, left_out = map(int, re.search(r"after (\d+) of 9 pairs: no outcome.*; (\d+) trials left out", words).groups())
    assert both >= 4, "five pairs that all fall one way reach p = 0.0625: until then it is open"
    assert left_out > 0 and sum(done(logs).values()) == 18 - left_out
    assert sum(map(int, re.findall(r"all tasks .*\((\d+) of 9 missing\)", out))) == left_out

    before = done(logs)
    again = evaluate(**flags)
    out_again, said_again = again.communicate()
    assert again.returncode == 0 and f"{left_out} trials stay left out" in said_again
    assert "starting a cluster" not in said_again and done(logs) == before and out_again == out
