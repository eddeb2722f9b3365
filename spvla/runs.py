"""The layout of a run folder: the one place that knows its names.

RUN/config.json                what was asked for
RUN/metrics.jsonl              one line a logged step: {"step": 10, "train_loss": ..., ...}
RUN/checkpoints/step_000300/   a PEFT adapter or a whole model, with dataset_statistics.json and training state
RUN/merged/step_000300/        adapters merged into the base, in OpenVLA's own layout
RUN/ledger.sqlite              every trial's outcome
RUN/videos/                    episode=N--success=S--task=....mp4
RUN/it-0/, RUN/it-1/, ...      self-play iterations, each a run folder itself; RUN/history.jsonl tells their story
RUN/trials/, RUN/trials.json   a sweep's trials, each a run folder itself, and their table
RUN/report.html
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from spvla.errors import UserError
from spvla.files import write_json
from spvla.reading import Count, Number, read_json, read_rows, require_form

CONFIG, METRICS, LEDGER, HISTORY, SWEEP, REPORT = (
    "config.json",
    "metrics.jsonl",
    "ledger.sqlite",
    "history.jsonl",
    "trials.json",
    "report.html",
)
DAMAGED = "Restore the file from a copy, or delete it: the report then goes without."
CHECKPOINTS, MERGED, VIDEOS = "checkpoints", "merged", "videos"
_STEP, _ITERATION = re.compile(r"step_(\d+)"), re.compile(r"it-(\d+)")


class Written(TypedDict):
    """config.json."""

    command: str
    config: dict[str, Any]


class Step(TypedDict):
    """What every line of metrics.jsonl has."""

    step: Count


class HistoryRow(TypedDict):
    """A line of history.jsonl: one policy, against the one that it was trained against."""

    name: str  # "start", "it-0", "it-1", ...
    checkpoint: str
    policy: str  # digest
    opponent: str
    successes: Count
    trials: Count
    difference: NotRequired[Number | None]
    low: NotRequired[Number | None]
    high: NotRequired[Number | None]
    p_value: NotRequired[Number | None]
    verdict: str
    best: str


class SweepRow(TypedDict):
    """A trial of trials.json."""

    name: str
    parameters: dict[str, bool | int | float | str | None]
    status: str
    objective: Number | None
    step: Count
    checkpoint: str
    error: str


class SweepTable(TypedDict):
    """trials.json."""

    metric: str
    trials: list[SweepRow]


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, oldest first. One without its metadata is still being written."""
    found = [(int(m[1]), p) for p in (run / CHECKPOINTS).glob("step_*") if (m := _STEP.fullmatch(p.name))]
    whole = ("adapter_config.json", "config.json")
    return sorted((step, p) for step, p in found if any((p / name).exists() for name in whole))


def latest_checkpoint(run: Path) -> Path | None:
    every = checkpoints(run)
    return every[-1][1] if every else None


def iterations(run: Path) -> list[Path]:
    """RUN/it-0, RUN/it-1, ... in the order of their numbers."""
    found = [(int(m[1]), p) for p in run.glob("it-*") if (m := _ITERATION.fullmatch(p.name))]
    return [p for _, p in sorted(found)]


def write_config(run: Path, command: str, config: Any) -> None:
    """`config` is one of the dataclasses of spvla.config."""
    from draccus import encode

    write_json(run / CONFIG, {"command": command, "config": encode(config)})


def read_config(run: Path) -> dict[str, Any]:
    """{"command": "train", "config": {...}}."""
    path = run / CONFIG
    if not path.exists():
        raise UserError(
            f"{run} holds no {CONFIG}",
            expected="a folder written by spvla train, evaluate, selfplay or sweep",
            remedy="Give the run's own folder.",
        )
    return read_json(path, Written, remedy="Restore it from a copy, or start a run in another folder.")


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """Every logged step, in order. A step logged again after a resume replaces the earlier; a torn line is dropped.

    Raises UserError for any other damage.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in read_rows(run / METRICS, dict[str, Number | None], remedy=DAMAGED):
        require_form(row, Step, f"a line of {run / METRICS}", remedy=DAMAGED)
        rows[row["step"]] = row
    yield from (rows[step] for step in sorted(rows))


def read_history(run: Path) -> list[dict[str, Any]]:
    """The iterations of a self-play run; none where it is another run."""
    return list(read_rows(run / HISTORY, HistoryRow, remedy="Restore the file from a copy."))


def read_sweep(run: Path) -> dict[str, Any] | None:
    """A sweep's table, best first; None where the run is none."""
    path = run / SWEEP
    remedy = "Delete it: the sweep's command, typed again, writes it anew."
    return read_json(path, SweepTable, remedy=remedy) if path.exists() else None
