"""Training runs: named by their flags, exact to resume, killed in every way, heard when interrupted."""

import _thread
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from training_parts import (
    DATASET,
    distance,
    flags_of,
    job_of,
    quick_flags,
    train_here,
    weights_of,
    when,
    write_toy_dataset,
)

from spvla import runs
from spvla.errors import CheckpointError, DatasetError, TrainingError, UserError
from spvla.files import write_json
from spvla.policies.registry import load_policy
from spvla.train import session as session_module
from spvla.train.prepare import datasets_of, locked, require_same_run, require_startable, run_id, start_policy
from spvla.train.run import train
from spvla.train.session import Place, Session
from spvla.types import Observation


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_toy_dataset(root)
    return root


# The run's folder and its inputs


def test_the_same_command_names_the_same_run_wherever_checkpoints_fall(tmp_path: Path) -> None:
    config = quick_flags(tmp_path, tmp_path)
    assert run_id(config) == run_id(dataclasses.replace(config, save_steps=9, max_steps=99, use_wandb=True))
    for other in ({"beta": 0.2}, {"learning_rate": 1e-5}, {"seed": 8}, {"num_workers": 2}, {"vla_path": "other"}):
        assert run_id(config) != run_id(dataclasses.replace(config, **other))
    assert run_id(config).startswith(f"tiny+{DATASET}+b2+lr-0.0005+lora-r4+spin-beta0.1-eta0+")
    assert run_id(dataclasses.replace(config, run_id="mine")) == "mine"


def test_a_run_name_cannot_leave_its_folder(tmp_path: Path) -> None:
    for name in ("../up", "a/b", "/etc", "x\n"):
        with pytest.raises(UserError, match="--run_id"):
            run_id(quick_flags(tmp_path, tmp_path, run_id=name))


def test_several_data_sets_carry_weights() -> None:
    assert datasets_of("a:1,b:2.5") == [("a", 1.0), ("b", 2.5)]
    assert datasets_of("a") == [("a", 1.0)]
    for wrong in ("a:x", "a,", "../a", "a:1:2", "a:-1,b:2", "a:0", "a:nan", "a:inf"):
        with pytest.raises(UserError):
            datasets_of(wrong)


def test_a_run_goes_on_only_with_the_flags_it_began_with(tmp_path: Path) -> None:
    config = quick_flags(tmp_path, tmp_path, run_id="a")
    start = start_policy(config, tmp_path)
    require_same_run(config, tmp_path, start)
    require_same_run(dataclasses.replace(config, max_steps=99, save_steps=1), tmp_path, start)
    with pytest.raises(UserError, match=r"another --beta 0.5; expected 0.1"):
        require_same_run(dataclasses.replace(config, beta=0.5), tmp_path, start)
    falling = dataclasses.replace(config, lr_schedule="cosine")  # its rates follow the number of steps
    run = tmp_path / "falling"
    run.mkdir()
    require_same_run(falling, run, start)
    with pytest.raises(UserError, match="another --max_steps 99"):
        require_same_run(dataclasses.replace(falling, max_steps=99), run, start)
    write_json(Path(start) / "dataset_statistics.json", {})
    with pytest.raises(UserError, match="same weights"):
        require_same_run(config, tmp_path, start)


def test_two_processes_cannot_train_one_run(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(UserError, match=f"being written by process {os.getpid()}"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


def test_a_missing_data_set_or_checkpoint_is_named_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nothing_no_noops"):
        train(quick_flags(tmp_path, tmp_path / "runs", dataset_name="nothing_no_noops"))
    assert not (tmp_path / "runs").exists()


def test_a_truncated_start_policy_is_named_before_ray_starts(data: Path, tmp_path: Path) -> None:
    base = Path(start_policy(quick_flags(data, tmp_path), tmp_path))
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        train(quick_flags(data, tmp_path / "runs", vla_path=str(base)))
    with pytest.raises(CheckpointError, match="no checkpoint at /nowhere"):
        train(quick_flags(data, tmp_path / "runs", vla_path="/nowhere"))
    assert not (tmp_path / "runs").exists()


# One process, no Ray: what a step leaves behind


@pytest.mark.parametrize(
    "flags",
    [
        {"image_aug": True, "lora_dropout": 0.2, "opponent_temperature": 1.0},
        {"opponent_update": "ema", "ema_decay": 0.5, "lr_schedule": "cosine", "grad_accumulation_steps": 2},
        {"objective": "sft"},
        {"objective": "sft", "use_lora": False, "loss_columns": "action", "weight_decay_on": "matrices"},
    ],
    ids=["sampled opponent, augmentation, dropout", "moving opponent, schedule, accumulation", "sft", "from nothing"],
)
def test_two_steps_and_two_more_equal_four_bit_for_bit(data: Path, tmp_path: Path, flags: dict) -> None:
    straight = train_here(quick_flags(data, tmp_path, run_id="straight", **flags))
    halves = quick_flags(data, tmp_path, run_id="halves", **flags)

    def leave(row: dict, checkpoint: Path | None) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train_here(halves, leave)  # at step 2, its checkpoint committed
    train_here(halves)
    assert distance(weights_of(straight), weights_of(tmp_path / "halves")) == 0
    rows = [list(runs.read_metrics(tmp_path / name)) for name in ("straight", "halves")]
    assert [r["total_loss"] for r in rows[0]] == [r["total_loss"] for r in rows[1]]
    assert [r["smoothed_loss"] for r in rows[0]] == pytest.approx([r["smoothed_loss"] for r in rows[1]], rel=1e-6)


@pytest.mark.parametrize("flags", [{"opponent_temperature": 1.0, "image_aug": True}, {"grad_accumulation_steps": 2}])
def test_an_opponent_that_answers_several_steps_at_once_changes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict
) -> None:
    """Five steps, asked one by one and by two, so that the last stands alone; a checkpoint falls between two."""
    runs_of = {}
    for ahead in (1, 2):
        monkeypatch.setattr(session_module, "steps_ahead", lambda config, device, ahead=ahead: ahead)
        places = {"run_id": f"ahead-{ahead}", "max_steps": 5, "save_steps": 3}
        config = quick_flags(data, tmp_path, learning_rate=1e-4, **places, **flags)  # small, as in `ddp_learner`
        runs_of[ahead] = train_here(config)
    losses = {ahead: [row["total_loss"] for row in runs.read_metrics(run)] for ahead, run in runs_of.items()}
    assert losses[1] == pytest.approx(losses[2], abs=1e-5)
    assert distance(weights_of(runs_of[1]), weights_of(runs_of[2])) < 1e-5


def test_a_checkpoint_counts_what_was_stepped_not_what_was_asked(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "steps_ahead", lambda config, device: 3)
    session = Session(job_of(quick_flags(data, tmp_path, run_id="a", max_steps=9)), Place())
    session.advance()
    session.write(tmp_path / "checkpoint")
    wanted = [batch.samples.tolist() for (batch,) in session.coming]
    session.load(tmp_path / "checkpoint")
    assert not session.coming
    assert [next(session.batches).samples.tolist() for _ in range(2)] == wanted


def test_a_host_that_reads_one_step_behind_leaves_the_same_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same adapters bit for bit, same rows in the same order, same reports: as a GPU's host does it."""
    flags = {"max_steps": 7, "save_steps": 3, "val_steps": 2}
    reports: dict[str, list[tuple]] = {"at once": [], "behind": []}
    found = {}
    for name in reports:
        monkeypatch.setattr(session_module, "steps_behind", lambda device, name=name: int(name == "behind"))
        report = lambda row, saved, name=name: reports[name].append((row["step"], saved and saved.name))  # noqa: E731
        found[name] = train_here(quick_flags(data, tmp_path, run_id=name.replace(" ", "-"), **flags), report)
    assert distance(*(weights_of(run) for run in found.values())) == 0
    assert reports["at once"] == reports["behind"]
    rows = [
        [{k: v for k, v in row.items() if not k.endswith("_s") and k != "memory_gib"} for row in runs.read_metrics(run)]
        for run in found.values()
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == list(range(1, 8))


def test_a_host_that_reads_one_step_behind_stops_before_it_saves_a_hopeless_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "steps_behind", lambda device: 1)
    config = quick_flags(data, tmp_path, run_id="a", max_nonfinite_steps=2, max_steps=9, save_steps=4)
    train_here(dataclasses.replace(config, max_steps=1))
    with pytest.raises(TrainingError, match="2 steps in a row"):
        train_here(dataclasses.replace(config, learning_rate=1e30))  # steps 3 and 4, the latter to be saved
    assert [step for step, _ in runs.checkpoints(tmp_path / "a")] == [1]
    assert [row["step"] for row in runs.read_metrics(tmp_path / "a")] == [1, 2]


def test_a_run_goes_on_with_another_number_of_workers_from_the_very_next_sample(data: Path, tmp_path: Path) -> None:
    config = quick_flags(data, tmp_path, run_id="resized")
    alone = Session(job_of(config), Place())
    for _ in range(2):
        alone.advance()
    alone.write(tmp_path / "checkpoint")
    wanted = next(alone.batches).samples.tolist() + next(alone.batches).samples.tolist()
    pair = [Session(job_of(config), Place(rank=rank, world=2)) for rank in range(2)]
    for session in pair:
        session.load(tmp_path / "checkpoint")
    assert sorted(s for session in pair for s in next(session.batches).samples.tolist()) == sorted(wanted)


def test_self_play_begins_at_log_two_and_learns_from_there(data: Path, tmp_path: Path) -> None:
    run = train_here(quick_flags(data, tmp_path, run_id="a", max_steps=8, save_steps=8, learning_rate=2e-3))
    losses = [row["total_loss"] for row in runs.read_metrics(run)]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert min(losses[-3:]) < 0.6


def test_a_checkpoint_is_a_policy_by_itself_and_a_start_for_the_next_iteration(data: Path, tmp_path: Path) -> None:
    run = train_here(quick_flags(data, tmp_path, run_id="first", learning_rate=2e-3))
    checkpoint = runs.latest_checkpoint(run)
    with pytest.raises(UserError, match="--lora_rank 8 .* expected 4"):
        require_startable(quick_flags(data, tmp_path, vla_path=str(checkpoint), lora_rank=8))
    policy = load_policy(checkpoint)
    dark = Observation(images=(np.zeros((224, 224, 3), np.uint8),), instruction="follow the light")
    action = policy.act([dark], unnorm_key=DATASET)
    assert action.shape == (1, 1, 7) and np.isfinite(action).all()
    second = quick_flags(data, tmp_path, run_id="second", vla_path=str(checkpoint), max_steps=1)
    row = next(runs.read_metrics(train_here(second)))
    assert row["total_loss"] == pytest.approx(np.log(2), abs=1e-5)  # opponent = start policy, adapter and all
    assert row["policy_real_logps"] == pytest.approx(row["opponent_real_logps"], abs=1e-4)


def test_only_the_latest_checkpoint_is_kept_unless_all_are_asked_for(data: Path, tmp_path: Path) -> None:
    latest = train_here(quick_flags(data, tmp_path, run_id="latest"))
    every = train_here(quick_flags(data, tmp_path, run_id="every", save_latest_checkpoint_only=False))
    assert [step for step, _ in runs.checkpoints(latest)] == [4]
    assert [step for step, _ in runs.checkpoints(every)] == [2, 4]


def test_validation_looks_at_held_out_frames_and_leaves_training_as_it_was(data: Path, tmp_path: Path) -> None:
    plain = train_here(quick_flags(data, tmp_path, run_id="plain"))
    watched = train_here(quick_flags(data, tmp_path, run_id="watched", val_steps=3))
    rows = list(runs.read_metrics(watched))
    assert [row["step"] for row in rows if "val_action_accuracy" in row] == [3, 4]
    assert distance(weights_of(plain), weights_of(watched)) == 0


def test_an_empty_validation_split_is_told_before_the_first_step(data: Path, tmp_path: Path) -> None:
    config = quick_flags(data, tmp_path, run_id="a", val_steps=4, val_split_from_train=False)
    with pytest.raises(DatasetError, match="val split"):
        train_here(config)
    assert not list(runs.read_metrics(tmp_path / "a"))


def test_every_weight_can_be_trained_by_plain_behaviour_cloning(data: Path, tmp_path: Path) -> None:
    flags = {"objective": "sft", "use_lora": False, "learning_rate": 1e-3, "batch_size": 8}
    run = train_here(quick_flags(data, tmp_path, run_id="whole", max_steps=6, save_steps=6, **flags))
    losses = [row["train_loss"] for row in runs.read_metrics(run)]
    assert losses[-1] < losses[0] - 0.1
    checkpoint = runs.latest_checkpoint(run)
    assert (checkpoint / "model.safetensors").exists()
    assert DATASET in load_policy(checkpoint).norm_stats


def test_steps_that_are_not_finite_stop_the_run_and_leave_its_last_checkpoint(data: Path, tmp_path: Path) -> None:
    config = quick_flags(data, tmp_path, run_id="a", max_nonfinite_steps=2, max_steps=6, save_steps=1)
    train_here(dataclasses.replace(config, max_steps=1))
    wild = dataclasses.replace(config, learning_rate=1e30)
    with pytest.raises(TrainingError, match="2 steps in a row"):
        train_here(wild)
    assert runs.latest_checkpoint(tmp_path / "a") is not None


# Under Ray


def test_two_workers_learn_what_one_learns_with_twice_the_batch(data: Path, tmp_path: Path) -> None:
    small = {"val_steps": 4, "learning_rate": 1e-4}  # a small rate, as in `ddp_learner`
    flags = small | {"run_id": "two", "num_workers": 2, "batch_size": 2}
    two = train(quick_flags(data, tmp_path, **flags))
    one = train_here(quick_flags(data, tmp_path, run_id="one", batch_size=4, **small))
    assert distance(weights_of(two.run), weights_of(one)) < 1e-5
    assert two.step == 4 and two.checkpoint == two.run / "checkpoints" / "step_000004"
    alone = list(runs.read_metrics(one))[-1]
    assert two.metrics["val_action_accuracy"] == pytest.approx(alone["val_action_accuracy"], abs=1e-6)
    again = train(quick_flags(data, tmp_path, **flags, save_merged=True))
    assert again.checkpoint == two.checkpoint  # nothing left to do but this
    merged = load_policy(two.run / "merged" / "step_000004")
    adapted = load_policy(two.checkpoint)
    image, text = [np.full((224, 224, 3), 90, np.uint8)], ["follow the light"]
    _, logits = merged.decode(image, text, logits=True)
    _, expected = adapted.decode(image, text, logits=True)
    assert np.abs(logits - expected).max() < 1e-4


@contextmanager
def saboteur(run: Path, first: int) -> Iterator[list[str]]:
    """Kills Ray's processes as checkpoints `first` and the next appear; yields the list of its deeds."""
    deeds: list[str] = []

    def act() -> None:
        for step, victim in ((first, "RayTrainWorker"), (first + 5, "TrainController")):
            when(lambda step=step: newest(run) >= step)
            for process in psutil.Process().children(recursive=True):
                if victim in " ".join(process.cmdline()):
                    process.kill()
                    deeds.append(victim)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    yield deeds
    thread.join()


def newest(run: Path) -> int:
    every = runs.checkpoints(run)
    return every[-1][0] if every else 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_in_every_way_ends_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    config = quick_flags(data, tmp_path, run_id="a", max_steps=60, save_steps=5)
    command = [sys.executable, "-m", "spvla.cli", "train", *flags_of(config)]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    when(lambda: newest(tmp_path / "a") >= 5)
    orphans = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    psutil.wait_procs(orphans, timeout=60)  # Ray's processes outlive their driver by seconds, and go on training
    begun = newest(tmp_path / "a")
    assert begun < 50
    with saboteur(tmp_path / "a", first=begun + 5) as deeds:
        result = train(config)
    assert deeds == ["RayTrainWorker", "TrainController"]
    straight = train_here(dataclasses.replace(config, run_id="straight"))
    assert distance(weights_of(result.run), weights_of(straight)) == 0
    assert [row["step"] for row in runs.read_metrics(result.run)] == list(range(1, 61))


def test_an_interrupted_run_saves_at_once_and_goes_on_from_there(data: Path, tmp_path: Path) -> None:
    config = quick_flags(data, tmp_path, run_id="a", max_steps=10_000, save_steps=10_000)

    def interrupt() -> None:
        when(lambda: len(list(runs.read_metrics(tmp_path / "a"))) >= 2)
        _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train(config)
    step = newest(tmp_path / "a")
    assert 2 <= step < 10_000
    assert train(dataclasses.replace(config, max_steps=step)).step == step


def test_what_no_restart_can_mend_is_told_once(data: Path, tmp_path: Path) -> None:
    config = quick_flags(data, tmp_path, run_id="a", max_nonfinite_steps=2, learning_rate=1e30, max_steps=50)
    with pytest.raises(TrainingError, match="2 steps in a row"):
        train(config)
    lines = (tmp_path / "a" / runs.METRICS).read_text().splitlines()
    assert len(lines) == len(list(runs.read_metrics(tmp_path / "a")))  # no step was tried twice
