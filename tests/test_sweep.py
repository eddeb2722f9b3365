"""Sweeps: the space from the command line, the folder as the whole state, and a real one over real training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spvla.cli import parse
from spvla.config import SweepConfig, TrainConfig
from spvla.errors import UserError
from spvla.sweep import folder as sweep_folder
from spvla.sweep.judge import judge_new_checkpoints
from spvla.sweep.space import search_space


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
    space = search_space({"beta": "0.3,0.7", "lora_rank": "8,16", "loss_type": "sigmoid,hinge"})
    assert space == {
        "beta": {"grid_search": [0.3, 0.7]},
        "lora_rank": {"grid_search": [8, 16]},
        "loss_type": {"grid_search": ["sigmoid", "hinge"]},
    }


def test_ranges_are_drawn_within_their_ends() -> None:
    domain = search_space({"learning_rate": "loguniform(1e-5, 5e-4)"})["learning_rate"]
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
    ],
)
def test_a_bad_space_is_refused_before_anything_starts(flags: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        search_space(flags)


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
