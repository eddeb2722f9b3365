"""Merged models beside training: each of its own run, and what fails is given up."""

from pathlib import Path

import pytest
from policy_parts import write_adapter

from spvla import runs
from spvla.policies.checkpoint import norm_stats
from spvla.train import merge
from spvla.train.merge import Merger

UNIT = {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}}


def checkpoint(run: Path, suite: str) -> Path:
    return write_adapter(run / runs.CHECKPOINTS / "step_000010", norm_stats={suite: UNIT})


def test_runs_of_one_name_do_not_take_each_others_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every self-play run trains an it-0; the other's merge begins while the first's is under way."""
    places = [tmp_path / experiment / "it-0" for experiment in ("a", "b")]
    first, other = (Merger(run, tmp_path / "waiting", only_latest=True) for run in places)
    for run, suite in zip(places, ("libero_goal", "libero_object"), strict=True):
        checkpoint(run, suite)
    save_merged = merge.save_merged

    def interrupted(held: Path, folder: Path) -> None:
        monkeypatch.setattr(merge, "save_merged", save_merged)
        other.finish()
        save_merged(held, folder)

    monkeypatch.setattr(merge, "save_merged", interrupted)
    first.finish()
    merged = [norm_stats(run / "merged/step_000010") for run in places]
    assert merged == [{"libero_goal": UNIT}, {"libero_object": UNIT}]
    assert not list((tmp_path / "waiting").iterdir())


def test_a_merge_that_the_disk_has_no_room_for_is_told_once_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(held: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    checkpoint(tmp_path / "run", "libero_goal")
    monkeypatch.setattr(merge, "save_merged", full)
    Merger(tmp_path / "run", tmp_path / "waiting", only_latest=True).finish()
    assert capsys.readouterr().err.count("step_000010 failed: [Errno 28] No space left") == 1
    assert not list((tmp_path / "run/merged").iterdir())
