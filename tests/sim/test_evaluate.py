"""`spvla evaluate` from its flags to its files: mistakes are named before any work, and the work is the protocol's."""

import os
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import DEFAULT, patch

import pytest
from farm_parts import adapter_of, tiny_with_statistics

from spvla import cli, runs
from spvla.benchmarks.libero import assets
from spvla.benchmarks.libero.env import LiberoEnv
from spvla.config import EvaluateConfig, TrainConfig
from spvla.errors import UserError
from spvla.eval import session as farm_session
from spvla.eval.episode import run_trial
from spvla.eval.evaluate import run_evaluation
from spvla.eval.follow import checkpoints_to_come, pin_new, pins_of, steps_of
from spvla.eval.ledger import Ledger
from spvla.eval.plan import benchmark_of, describe, make_plan
from spvla.eval.sizing import Sizes
from spvla.files import discard
from spvla.policies.registry import load_policy


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_with_statistics(tmp_path_factory.mktemp("policies") / "tiny")


def run(capsys: pytest.CaptureFixture, **flags: object) -> str:
    words = [str(w) for name, value in flags.items() for w in (f"--{name}", value)]
    assert cli.run(["evaluate", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1
    return said.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"task_suite_name": "libero_kitchen"}, ["libero_kitchen", "libero_object"]),
        ({"task_suite_name": "libero_object", "tasks": "[0, 10]"}, ["task 10", "0 to 9"]),
        ({"task_suite_name": "libero_object", "num_trials_per_task": 51}, ["51", "50 at most"]),
        ({"task_suite_name": "libero_object", "unnorm_key": "bridge"}, ["bridge", "libero_object_no_noops"]),
        ({"task_suite_name": "libero_object", "pretrained_checkpoint": "/nowhere"}, ["no checkpoint at /nowhere"]),
        ({"task_suite_name": "libero_object", "local_log_dir": "/proc/logs"}, ["--local_log_dir", "cannot be written"]),
        ({"task_suite_name": "libero_object", "libero_assets": "/proc"}, ["--libero_assets", "/proc"]),
        ({"task_suite_name": "libero_object", "run_id_note": "a/b"}, ["run_id_note", "a/b"]),
        ({"task_suite_name": "libero_object", "stop_when_settled": True}, ["--stop_when_settled", "two"]),
        ({"follow": "/nowhere"}, ["--follow"]),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    flags: dict, words: list[str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said = run(capsys, **({"pretrained_checkpoint": tiny, "local_log_dir": tmp_path / "logs"} | flags))
    for word in words:
        assert word in said
    assert not list(tmp_path.rglob("*.txt"))


def test_a_damaged_ledger_is_refused_and_kept(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"x" * 5000)
    said = run(capsys, pretrained_checkpoint=tiny, task_suite_name="libero_object", local_log_dir=tmp_path)
    assert "ledger.sqlite cannot be used" in said
    assert (tmp_path / "ledger.sqlite").read_bytes() == b"x" * 5000


def test_a_renderer_that_does_not_work_is_told_before_ray_starts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with (
        patch.object(farm_session, "connection", side_effect=AssertionError("Ray was started")),
        pytest.raises(UserError, match="MUJOCO_GL=nonsense; expected egl or osmesa"),
    ):
        run_evaluation(config(tiny, tmp_path), checkpoints=[tiny])


def test_several_checkpoints_and_suites_make_one_plan(tiny: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tiny, tmp_path / "run/checkpoints/step_000300", seed=1)
    config = EvaluateConfig(
        pretrained_checkpoint="x", task_suite_name="libero_object,libero_goal", tasks=(3,), num_trials_per_task=2
    )
    plan = make_plan(config, benchmark_of(config), [tiny, adapter])
    assert [v.name for v in plan.versions] == ["tiny", "run/step_000300"]
    assert [v.is_adapter for v in plan.versions] == [False, True]
    assert plan.versions[1].base == str(tiny)
    assert len(plan.trials) == 8 and plan.suites == ["libero_goal", "libero_object"]
    assert set(plan.unnorm_keys.values()) == {"libero_object_no_noops", "libero_goal_no_noops"}


def config(tiny: Path, folder: Path) -> EvaluateConfig:
    return EvaluateConfig(
        pretrained_checkpoint=str(tiny),
        task_suite_name="libero_object",
        tasks=(0,),
        num_trials_per_task=2,
        num_steps_wait=2,
        max_steps=6,
        local_log_dir=folder,
        num_envs=2,
        num_videos=0,
        max_failure_videos=1,
        run_id_note="X",
    )


@pytest.mark.usefixtures("ray_cluster")
def test_a_real_evaluation_equals_the_same_trials_played_one_by_one(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wanted = config(tiny, tmp_path)
    task, total = run_evaluation(wanted, checkpoints=[tiny])
    assert (task.task, task.done, total.task, total.done, total.errors) == (0, 2, None, 2, 0)

    with Ledger.open(tmp_path / runs.LEDGER) as ledger:
        rows, protocol = ledger.outcomes(), ledger.protocol()
    policy = load_policy(tiny, decode_batch_size=protocol.decode_batch_size)
    env = LiberoEnv("libero_object", 0, assets.resolve())
    for row in reversed(rows):
        alone = run_trial(
            env,
            lambda observation: policy.act([observation], unnorm_key="libero_object_no_noops")[0],
            row.trial,
            needs=policy.needs,
            num_steps_wait=2,
            center_crop=True,
            max_steps=6,
        )
        assert (row.status, row.steps, row.state_digest) == (alone.status, alone.steps, alone.state_digest)
    env.close()

    assert protocol.world["assets"] == assets.resolve().name and protocol.max_steps == 6 and protocol.device == "cpu"
    (log,) = tmp_path.glob("EVAL-libero_object-openvla-*--X.txt")
    assert log.read_text().count("Starting episode") == 2
    (video,) = [row.video for row in rows if row.video]
    assert (tmp_path / video).stat().st_size > 1000 and video.endswith(".mp4")
    assert (tmp_path / "results.json").exists() and (tmp_path / "trials.csv").exists()

    log.unlink(), (tmp_path / "results.json").unlink()  # as if killed before they were written
    capsys.readouterr()
    again = run_evaluation(wanted, checkpoints=[tiny])
    assert len(list(tmp_path.glob("EVAL-*"))) == 1 and (tmp_path / "results.json").exists()
    run_evaluation(wanted, checkpoints=[tiny])
    assert len(list(tmp_path.glob("EVAL-*"))) == 1  # it is there
    assert again == [task, total]
    assert "nothing is missing" in capsys.readouterr().err
    with pytest.raises(UserError, match="num_steps_wait: 2 -> 3"):
        run_evaluation(EvaluateConfig(**(vars(wanted) | {"num_steps_wait": 3})), checkpoints=[tiny])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_environments_spare_the_gpu_where_the_policy_decodes_on_one(tmp_path: Path, device: str) -> None:
    sizes = Sizes(envs=2, decoders=1, env_cpus=1, device=device)
    with (
        patch.multiple(farm_session, connection=nullcontext, cluster_sizes=lambda *_: sizes, Farm=DEFAULT) as patched,
        farm_session.session(EvaluateConfig(pretrained_checkpoint="x", local_log_dir=tmp_path)) as opened,
    ):
        patched["Farm"].side_effect = lambda config, **settings: nullcontext(settings["working"])
        working = opened._open_farm()
        with working.benchmark.open_env("libero_object", 0, spare_gpu=working.spare_gpu) as env:
            assert env.spare_gpu == (device == "cuda")


def training_run(folder: Path, *, max_steps: int) -> Path:
    runs.write_config(folder, "train", TrainConfig(max_steps=max_steps))
    return folder


def test_new_checkpoints_are_followed_newest_first_and_kept_though_training_deletes_them(
    tiny: Path, tmp_path: Path
) -> None:
    run, pins = training_run(tmp_path / "run", max_steps=30), tmp_path / "pins/run"
    assert steps_of(run) == 30
    for step in (10, 20):
        folder = adapter_of(tiny, run / "checkpoints" / runs.checkpoint_name(step), seed=step)
        (folder / "training_state.safetensors").write_bytes(b"large")
    coming = checkpoints_to_come(run, pins, steps_of(run))
    step, pinned = next(coming)
    assert (step, pinned) == (20, pins / "checkpoints/step_000020")
    assert not (pinned / "training_state.safetensors").exists()
    for path in (run / "checkpoints/step_000010").iterdir():
        path.unlink()
    (run / "checkpoints/step_000010").rmdir()
    adapter_of(tiny, run / "checkpoints/step_000030", seed=30)
    assert [s for s, _ in coming] == [30, 10]
    assert describe(str(pins / "checkpoints/step_000010")).name == "run/step_000010"


def test_who_follows_a_run_that_has_fallen_silent_is_told_so_once(tiny: Path, tmp_path: Path) -> None:
    run, said = training_run(tmp_path / "run", max_steps=10), []
    os.utime(run / "config.json", (time.time() - 720,) * 2)

    def say(line: str) -> None:
        said.append(line)
        threading.Timer(1.5, adapter_of, (tiny, run / "checkpoints/step_000010"), {"seed": 1}).start()

    assert [step for step, _ in checkpoints_to_come(run, tmp_path / "pins", 10, say)] == [10]
    assert len(said) == 1 and "nothing for 12 minutes" in said[0] and "step 10" in said[0]


def test_a_pin_is_a_link_and_not_a_copy(tiny: Path, tmp_path: Path) -> None:
    run = training_run(tmp_path / "run", max_steps=10)
    folder = adapter_of(tiny, run / "checkpoints/step_000010", seed=1)
    pin_new(run, tmp_path / "pins")
    pinned = tmp_path / "pins/checkpoints/step_000010/adapter_model.safetensors"
    assert os.path.samefile(pinned, folder / "adapter_model.safetensors")


def test_runs_of_one_name_are_followed_apart(tmp_path: Path) -> None:
    pins = [pins_of(tmp_path / experiment / "it-0", tmp_path / "logs") for experiment in ("a", "b")]
    assert pins[0] != pins[1] and {p.name for p in pins} == {"it-0"}


def test_a_run_that_was_trained_anew_is_not_taken_for_the_old_one(tiny: Path, tmp_path: Path) -> None:
    run, pins = training_run(tmp_path / "run", max_steps=10), tmp_path / "pins"
    adapter_of(tiny, run / "checkpoints/step_000010", seed=1)
    pin_new(run, pins), pin_new(run, pins)
    discard(run / "checkpoints/step_000010")
    adapter_of(tiny, run / "checkpoints/step_000010", seed=2)
    with pytest.raises(UserError, match="step_000010 is not the checkpoint that was followed"):
        pin_new(run, pins)


def test_only_a_training_run_can_be_followed(tmp_path: Path) -> None:
    runs.write_config(tmp_path, "evaluate", EvaluateConfig(pretrained_checkpoint="x"))
    with pytest.raises(UserError, match="folder of spvla evaluate"):
        steps_of(tmp_path)
