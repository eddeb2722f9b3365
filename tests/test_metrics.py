"""Numbers reach the file, the console and W&B, once each and in order, whatever was killed."""

from pathlib import Path

import pytest
import wandb

from spvla import runs
from spvla.config import TrainConfig
from spvla.train.metrics import Follower, MetricsFile, Row, Smoothed, WandbCurves


class Recorder:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.closed = False

    def write(self, row: Row) -> None:
        self.rows.append(row)

    def close(self) -> None:
        self.closed = True


def test_the_moving_average_starts_at_the_first_value_and_leaves_nan_out() -> None:
    smoothed = Smoothed(decay=0.9)
    assert smoothed.add(2.0) == 2.0
    assert smoothed.add(float("nan")) == 2.0
    assert smoothed.add(1.0) == pytest.approx(1.9)


def test_a_follower_hands_each_new_row_on_once(tmp_path: Path) -> None:
    MetricsFile(tmp_path).append({"step": 1, "total_loss": 3.0})
    recorder = Recorder()
    with Follower(tmp_path, [recorder]) as follower:
        file = MetricsFile(tmp_path)
        file.append({"step": 2, "total_loss": 2.0})
        follower.poll()
        follower.poll()
        file.append({"step": 3, "total_loss": float("nan")})
    assert recorder.rows == [{"step": 2, "total_loss": 2.0}, {"step": 3, "total_loss": None}]
    assert recorder.closed


def test_a_line_torn_by_a_kill_costs_that_line_only(tmp_path: Path) -> None:
    MetricsFile(tmp_path).append({"step": 1, "x": 1.0})
    with (tmp_path / runs.METRICS).open("a") as f:
        f.write('{"step": 2, "x"')
    MetricsFile(tmp_path).append({"step": 2, "x": 2.0})
    assert list(runs.read_metrics(tmp_path)) == [{"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}]


def test_wandb_offline_keeps_curves_in_the_run_and_no_key_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.setup()  # W&B reads its variables here, as if an earlier run of this process had started it
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = TrainConfig(use_wandb=True)  # "online", but the environment says otherwise
    first = WandbCurves(tmp_path, config)
    first.write({"step": 1, "total_loss": 0.5})
    first.close()
    again = WandbCurves(tmp_path, config)
    assert again.wandb.run.id == (tmp_path / "wandb" / "id").read_text()
    again.close()
    files = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_symlink()]
    assert any(p.suffix == ".wandb" and b"total_loss" in p.read_bytes() for p in files)
    assert not [p for p in files if key.encode() in p.read_bytes()]
