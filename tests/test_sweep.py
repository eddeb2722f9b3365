"""Sweeps: the space from the command line, the folder as the whole state, and a real one over real training."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from draccus import encode
from training_parts import flags_of, quick_flags, when, write_toy_dataset

from spvla import runs
from spvla.cli import parse
from spvla.config import SweepConfig, TrainConfig
from spvla.data.index import ensure_index
from spvla.errors import ClusterError, InfrastructureError, UserError
from spvla.eval.ledger import Ledger
from spvla.eval.summary import Summary
from spvla.files import safe_name
from spvla.policies.checkpoint import policy_digest
from spvla.policies.openvla.presets import create_preset
from spvla.sweep import folder as sweep_folder
from spvla.sweep.judge import evaluation, judge_new_checkpoints, success_rates
from spvla.sweep.space import search_space
from spvla.sweep.sweep import sweep

DATA = "libero_object_no_noops"  # its statistics' key lets the policies act in libero_object


def config(folder: Path, **space: str) -> SweepConfig:
    return SweepConfig(space=space, train=TrainConfig(run_root_dir=folder, run_id="s", max_steps=4))


def make_trial(folder: Path, name: str, *, steps: tuple[int, ...]) -> Path:
    run = folder / sweep_folder.TRIALS / name
    for step in steps:
        (run / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
        (run / "checkpoints" / f"step_{step:06d}" / "adapter_config.json").write_text("{}")
    (run / sweep_folder.PARAMETERS).write_text(json.dumps({"beta": 0.3 if name == "a" else 0.7}))
    return run


def test_lists_are_grids_of_values_of_the_flags_type() -> None:
    given = {"beta": "0.3,0.7", "lora_rank": "8, 16", "loss_type": "sigmoid,hinge"}
    assert search_space(given | {"image_aug": "True,False", "logit_softcap": "None,30"}, TrainConfig()) == {
        "beta": {"grid_search": [0.3, 0.7]},
        "lora_rank": {"grid_search": [8, 16]},
        "loss_type": {"grid_search": ["sigmoid", "hinge"]},
        "image_aug": {"grid_search": [True, False]},
        "logit_softcap": {"grid_search": [None, 30.0]},
    }


def test_a_value_named_twice_is_one_trial() -> None:
    assert search_space({"beta": "0.3,0.7,0.30"}, TrainConfig()) == {"beta": {"grid_search": [0.3, 0.7]}}


def test_swept_values_are_checked_beside_the_flags_that_all_trials_share() -> None:
    grid = search_space({"use_lora": "True,False"}, TrainConfig(objective="sft"))["use_lora"]["grid_search"]
    assert grid == [True, False]
    with pytest.raises(UserError, match="--use_lora False with --objective spin"):
        search_space({"use_lora": "True,False"}, TrainConfig())


def test_ranges_are_drawn_within_their_ends() -> None:
    domain = search_space({"learning_rate": "loguniform(1e-5, 5e-4)"}, TrainConfig())["learning_rate"]
    draws = [domain.sample() for _ in range(200)]
    assert min(draws) >= 1e-5 and max(draws) <= 5e-4
    assert sum(d < 7.1e-5 for d in draws) in range(60, 141)  # half of them below the geometric middle


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, "at least one training flag"),
        ({"beta": "0.3,much"}, "--beta much"),
        ({"beta": "0.3,-1"}, "--beta -1.0"),
        ({"beta": "uniform(0.9,0.3)"}, "a low end below the high end"),
        ({"learning_rate": "loguniform(0.0001,inf)"}, "inf"),
        ({"lora_rank": "uniform(4,16)"}, "expected a list: a range has fractions"),
        ({"logit_softcap": "uniform(None,30)"}, "expected a list"),
        ({"beta": "None,0.3"}, "--beta None; expected a value"),
        ({"run_id": "a,b"}, "--run_id a,b; expected one value, which all trials share"),
        ({"data_root_dir": "here,there"}, "--data_root_dir here,there; expected one value"),
        ({"save_steps": "2,4"}, "--save_steps 2,4; expected one value"),
    ],
)
def test_a_bad_space_is_refused_before_anything_starts(flags: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        search_space(flags, TrainConfig())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"tasks": (0, 99)}, "--tasks names task 99"),
        ({"num_trials_per_task": 51}, "--num_trials_per_task 51; expected 50 at most"),
    ],
)
def test_trials_that_do_not_exist_are_refused_before_anything_starts(
    flags: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        sweep(replace(config(tmp_path, beta="0.3,0.7"), **flags))
    assert not any(tmp_path.iterdir())


def test_the_same_flags_name_the_same_folder_and_others_another(tmp_path: Path) -> None:
    one = replace(config(tmp_path, beta="0.3,0.7"), train=TrainConfig())
    assert sweep_folder.sweep_id(one) == sweep_folder.sweep_id(replace(one))
    assert sweep_folder.sweep_id(one) != sweep_folder.sweep_id(replace(one, space={"beta": "0.3,0.8"}))


def test_each_checkpoint_is_judged_once_however_often_the_sweep_starts(tmp_path: Path) -> None:
    make_trial(tmp_path, "a", steps=(2, 4))
    asked: list[Path] = []

    def judge(paths: list[Path]) -> dict[Path, float]:
        asked.extend(paths)
        return {path: 0.5 for path in paths}

    for _ in range(3):
        judge_new_checkpoints(tmp_path, judge)
    assert [path.name for path in asked] == ["step_000002", "step_000004"]


def test_checkpoints_with_equal_weights_have_one_success_rate(tmp_path: Path) -> None:
    twins = [tmp_path / name / "checkpoints" / "step_000002" for name in ("a", "b")]
    for path in twins:
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
    counts = {"planned": 4, "done": 4, "errors": 0, "suite": DATA, "instruction": ""}
    named = {"policy": policy_digest(twins[0]), "policy_name": "a/step_000002"}
    summaries = [Summary(**named, **counts, task=0, successes=4), Summary(**named, **counts, task=None, successes=3)]
    assert success_rates(twins, summaries) == {twins[0]: 0.75, twins[1]: 0.75}
    lost = Summary(**named, **counts | {"done": 0, "errors": 4}, task=None, successes=0)
    with pytest.raises(InfrastructureError, match="every trial of .*step_000002 fell to errors"):
        success_rates(twins, [lost])


@pytest.mark.parametrize(
    ("dataset", "key"),
    [("libero_object_no_noops", None), ("my_own:1,libero_object:2", None), ("my_own:1,other:2", "my_own")],
)
def test_policies_act_with_the_statistics_of_what_they_learned(dataset: str, key: str | None, tmp_path: Path) -> None:
    train = TrainConfig(dataset_name=dataset)
    swept = SweepConfig(space={}, train=train, task_suite_name="libero_object", num_envs=1)
    assert evaluation(swept, tmp_path).unnorm_key == key


def test_the_table_is_best_first_and_says_how_each_trial_ended(tmp_path: Path) -> None:
    for name, steps in (("a", (2, 4)), ("b", (2, 4)), ("c", (2,))):
        make_trial(tmp_path, name, steps=steps)
    (tmp_path / sweep_folder.TRIALS / "c" / sweep_folder.STOPPED).touch()
    judge_new_checkpoints(tmp_path, lambda paths: {p: 0.9 if p.parent.parent.name == "b" else 0.1 for p in paths})
    rows = sweep_folder.write_table(tmp_path, config(tmp_path, beta="0.3,0.7"))
    assert [(row.name, row.status, row.step) for row in rows] == [
        ("b", "done", 4),
        ("a", "done", 4),
        ("c", "stopped", 2),
    ]
    assert sweep_folder.table(rows, "success_rate").endswith(f"best  {rows[0].checkpoint}")


def test_sweep_flags_reach_their_config() -> None:
    _, parsed = parse(
        ["sweep", "--beta", "0.3,0.7", "--metric", "val_action_accuracy", "--max_concurrent", "2", "--batch_size", "4"]
    )
    assert (parsed.metric, parsed.max_concurrent, parsed.train.batch_size) == ("val_action_accuracy", 2, 4)


# Real ones


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_toy_dataset(root, name=DATA)
    ensure_index(root, DATA)
    return root


def real_config(data: Path, folder: Path, **flags: object) -> SweepConfig:
    train = quick_flags(data, folder, run_id="s", dataset_name=DATA, max_steps=4, save_steps=2)
    given = {"space": {"beta": "0.3,0.7"}, "metric": "val_action_accuracy", "task_suite_name": "libero_object"}
    return SweepConfig(train=train, **given | {"max_concurrent": 2} | flags)


def test_a_sweep_trains_judges_ranks_and_tells_of_a_trial_that_fails_at_once(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ray_cluster: None,
) -> None:
    create_preset(tmp_path / "start", "tiny")
    (tmp_path / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)  # a trial's own working folder is another, where none of these paths would hold
    config = real_config(Path("data"), Path("."), space={"beta": "0.3", "learning_rate": "2e-4,5e-4,1e30"})
    flags = {"vla_path": "start", "adapter_tmp_dir": Path("merging"), "save_merged": True, "max_nonfinite_steps": 1}
    *rows, failed = sweep(replace(config, max_concurrent=3, train=replace(config.train, **flags)))
    assert sorted(row.parameters["learning_rate"] for row in rows) == [2e-4, 5e-4]
    assert {row.status for row in rows} <= {"done", "stopped"} and rows[0].status == "done"
    for row in rows:
        measured = {
            r["step"]: r.get("val_action_accuracy") for r in runs.read_metrics(tmp_path / "s/trials" / row.name)
        }
        assert row.objective == measured[row.step]
        assert (Path(row.checkpoint) / "adapter_model.safetensors").exists()
    assert rows[0].objective >= (rows[1].objective or 0)
    assert (failed.parameters, failed.status) == ({"beta": 0.3, "learning_rate": 1e30}, "failed")
    assert failed.objective is None and "not finite" in failed.error
    assert json.loads((tmp_path / "s" / "trials.json").read_text())["trials"][0]["name"] == rows[0].name
    assert (tmp_path / "merging").is_dir()
    said = capsys.readouterr()
    assert "Trial " not in said.out and "sweep  3/3 trials" in said.err


def test_a_sweep_that_cannot_be_judged_or_cannot_fit_is_refused(data: Path, tmp_path: Path, ray_cluster: None) -> None:
    few = tmp_path / "few"
    write_toy_dataset(few, episodes=4, name=DATA)
    with pytest.raises(UserError, match="the val split of libero_object_no_noops is empty"):
        sweep(real_config(few, tmp_path))
    wide = real_config(data, tmp_path / "wide", metric="success_rate")
    with pytest.raises(ClusterError, match="4 CPU in all; expected at least 5 CPU for a trial of 4 workers beside"):
        sweep(replace(wide, train=replace(wide.train, num_workers=4)))
    with pytest.raises(UserError, match="was started with another --metric"):
        sweep(replace(real_config(few, tmp_path), metric="success_rate"))


def command(config: SweepConfig) -> list[str]:
    own = ("metric", "task_suite_name", "max_concurrent", "tasks", "num_trials_per_task", "max_trial_steps", "num_envs")
    flags = [str(part) for name in own for part in (f"--{name}", encode(getattr(config, name)))]
    swept = [part for name, text in config.space.items() for part in (f"--{name}", text)]
    flags = [part for i, part in enumerate(flags) if "None" not in flags[i - i % 2 : i - i % 2 + 2]]
    return [sys.executable, "-m", "spvla.cli", "sweep", *flags_of(config.train), *swept, *flags]


def verdicts(folder: Path) -> list[dict]:
    return [row for run in sweep_folder.trial_folders(folder) for row in sweep_folder.judged(run)]


def ended(folder: Path) -> list[Path]:
    return [r for r in sweep_folder.trial_folders(folder) if sweep_folder.status_of(r, 4) in sweep_folder.ENDED]


def written_at(runs_ended: list[Path]) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for run in runs_ended for p in run.rglob("adapter_model.safetensors")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_poor_trial_is_stopped_early_and_a_broken_one_told(tmp_path: Path, ray_cluster: None) -> None:
    write_toy_dataset(tmp_path / "data", name=DATA, brightest=1)
    space = {"learning_rate": "1e-2,1e-12,1e30", "max_grad_norm": "None"}
    config = real_config(tmp_path / "data", tmp_path, space=space, max_concurrent=1)
    longer = replace(config.train, objective="sft", max_steps=240, save_steps=60)  # ASHA looks at steps 60 and 240
    good, poor, broken = sweep(replace(config, train=longer))
    assert [row.parameters["learning_rate"] for row in (good, poor, broken)] == [1e-2, 1e-12, 1e30]
    assert (good.status, good.step) == ("done", 240)
    assert poor.status == "stopped"
    assert good.objective == 1 > poor.objective and poor.step < 240
    assert (broken.status, broken.objective) == ("failed", None)
    assert "not finite" in broken.error


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trial_whose_process_dies_is_tried_again(data: Path, tmp_path: Path) -> None:
    config = real_config(data, tmp_path)
    config = replace(config, train=replace(config.train, max_steps=60, save_steps=20))
    driver = subprocess.Popen(command(config), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    run = tmp_path / "s" / "trials" / "beta=0.3"
    when(lambda: runs.checkpoints(run), timeout_s=240)
    trials = [p for p in psutil.Process(driver.pid).children(recursive=True) if "ImplicitFunc" in " ".join(p.cmdline())]
    assert trials
    for process in trials:
        process.kill()
    said, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, said
    rows = json.loads((tmp_path / "s" / "trials.json").read_text())["trials"]
    assert {row["status"] for row in rows} <= {"done", "stopped"} and len(rows) == 2
    steps = [row["step"] for row in runs.read_metrics(run)]
    assert steps == list(range(1, len(steps) + 1))  # from its last checkpoint: no step twice, none missing


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_repeats_no_ended_trial(data: Path, tmp_path: Path) -> None:
    config = real_config(data, tmp_path, space={"beta": "0.3,0.7", "learning_rate": "2e-4,5e-4"})
    driver = subprocess.Popen(command(config), stderr=subprocess.DEVNULL, start_new_session=True)
    when(lambda: len(ended(tmp_path / "s")) >= 1, timeout_s=600)
    driver.kill()
    driver.wait()
    before, asked = written_at(ended(tmp_path / "s")), verdicts(tmp_path / "s")
    assert before and len(ended(tmp_path / "s")) < 4
    done = subprocess.run(command(config), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "s" / "trials.json").read_text())["trials"]
    assert len(rows) == 4 and {row["status"] for row in rows} <= {"done", "stopped"}
    assert before.items() <= written_at(ended(tmp_path / "s")).items()
    told = [(row["checkpoint_path"], row["step"]) for row in verdicts(tmp_path / "s")]
    assert len(set(told)) == len(told) and len(told) > len(asked)
    assert "best  " in done.stdout and done.stdout.count("0.") >= 12


@pytest.mark.slow
def test_an_interrupted_sweep_leaves_no_process_and_goes_on(data: Path, tmp_path: Path) -> None:
    config = real_config(data, tmp_path)
    config = replace(config, train=replace(config.train, max_steps=5000, save_steps=5000))
    driver = subprocess.Popen(
        command(config),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
    )
    trials = [tmp_path / "s" / "trials" / f"beta={beta}" for beta in (0.3, 0.7)]
    when(lambda: all(any(True for _ in runs.read_metrics(run)) for run in trials), timeout_s=600)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=180)
    assert driver.returncode == 130 and said.endswith("the same command goes on from here\n")
    _, left = psutil.wait_procs(family, timeout=30)
    assert left == []
    saved = [runs.checkpoints(run)[-1][0] for run in trials]
    assert all(step >= 1 for step in saved)  # the interrupt saved them: save_steps is far away
    longer = replace(config, train=replace(config.train, max_steps=max(saved) + 2))
    done = subprocess.run(command(longer), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for run, step in zip(trials, saved, strict=True):
        steps = [row["step"] for row in runs.read_metrics(run)]
        assert steps == list(range(1, len(steps) + 1)) and steps[-1] >= step


@pytest.mark.slow
def test_all_trials_are_judged_by_success_on_one_farm(data: Path, tmp_path: Path) -> None:
    config = real_config(data, tmp_path, metric="success_rate", tasks=(0,), num_trials_per_task=1, max_trial_steps=6)
    done = subprocess.run(command(config), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    with Ledger.open(tmp_path / "s" / runs.LEDGER) as ledger:
        outcomes = ledger.outcomes()
    rows = verdicts(tmp_path / "s")
    assert len(outcomes) == len(rows) >= 3 and len({o.policy for o in outcomes}) == len(outcomes)
    assert done.stderr.count("environments (") == 1  # one farm for all


MANY = {f"flag_{i}": "a" * 20 for i in range(12)}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({**MANY, "z": 1}, {**MANY, "z": 2}),
        ({"learning_rate": 1.00000001e-4}, {"learning_rate": 1.00000002e-4}),
        ({"dataset_name": "a:1"}, {"dataset_name": "a_1"}),
    ],
)
def test_two_trials_never_share_a_folder(one: dict, other: dict) -> None:
    names = [sweep_folder.trial_name(one), sweep_folder.trial_name(other)]
    assert names[0] != names[1]
    assert [safe_name(name, what="trial") for name in names] == names


def test_a_trial_whose_values_fit_is_named_by_them_alone() -> None:
    assert sweep_folder.trial_name({"beta": 0.3, "learning_rate": 5e-5}) == "beta=0.3+learning_rate=5e-05"
