"""A sweep's folder, which is its whole state: one run folder a trial, with the verdicts on its checkpoints.

SWEEP/trials/NAME/parameters.json   what this trial varies
SWEEP/trials/NAME/judged.jsonl      {"step": 300, "objective": 0.62, "checkpoint_path": ...} a line
SWEEP/trials/NAME/stopped, failed   marks: ASHA stopped it; why it failed for good
SWEEP/trials.json                   the table, best first
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from spvla import runs
from spvla.config import SweepConfig, TrainConfig
from spvla.files import readable_name, safe_name, write_json
from spvla.reading import Count, Number, read_json, read_rows
from spvla.train.prepare import run_id

TRIALS, JUDGED, PARAMETERS = "trials", "judged.jsonl", "parameters.json"
STOPPED, FAILED = "stopped", "failed"
ENDED = ("done", STOPPED)

Parameters = dict[str, Any]  # training flag -> value


@dataclass(frozen=True, kw_only=True)
class SweepTrial:
    """One row of the table."""

    name: str
    parameters: Parameters
    status: str  # "running", "done", "stopped" (by ASHA), "failed"
    objective: float | None  # of its last judged checkpoint
    step: int
    checkpoint: str
    error: str  # of a failed one


class Verdict(TypedDict):
    """A line of judged.jsonl."""

    step: Count
    objective: Number
    checkpoint_path: str


def sweep_id(config: SweepConfig) -> str:
    """The same flags name the same folder."""
    if config.train.run_id:
        return safe_name(config.train.run_id, what="--run_id")
    swept = "+".join(f"{flag}={text}" for flag, text in config.space.items())
    name = f"sweep-{run_id(config.train)}-{swept}"
    return readable_name(name, exact=name)


def trial_config(train: TrainConfig, folder: Path, parameters: Parameters) -> TrainConfig:
    """Each trial is a run of its own; all its checkpoints stay until they are judged."""
    name = trial_name(parameters)
    return replace(train, **parameters, run_root_dir=folder / TRIALS, run_id=name, save_latest_checkpoint_only=False)


def trial_name(parameters: Parameters) -> str:
    """What it varies, and a digest where the name alone would not tell two trials apart."""
    short = "+".join(f"{k}={_short(v)}" for k, v in sorted(parameters.items()))
    exact = "+".join(f"{k}={v}" for k, v in sorted(parameters.items()))
    lossless = all(float(_short(v)) == v for v in parameters.values() if isinstance(v, float))
    return readable_name(short, exact=short if lossless else exact)


def run_folder(config: TrainConfig) -> Path:
    return config.run_root_dir / run_id(config)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def trial_folders(folder: Path) -> list[Path]:
    return sorted(p.parent for p in (folder / TRIALS).glob(f"*/{PARAMETERS}"))


def judged(run: Path) -> list[dict[str, Any]]:
    """The verdicts on its checkpoints, in their order. Raises UserError."""
    remedy = "Delete it: the sweep's command, typed again, judges the trial's checkpoints anew."
    return list(read_rows(run / JUDGED, Verdict, remedy=remedy))


def status_of(run: Path, max_steps: int) -> str:
    verdicts = judged(run)
    if verdicts and verdicts[-1]["step"] >= max_steps:
        return "done"
    marks = [mark for mark in (STOPPED, FAILED) if (run / mark).exists()]
    return marks[0] if marks else "running"


def write_table(folder: Path, config: SweepConfig) -> list[SweepTrial]:
    """The trials, best first, also as SWEEP/trials.json."""
    rows = [sweep_trial(run, config.train.max_steps) for run in trial_folders(folder)]
    rows.sort(key=lambda row: (row.objective is None, -(row.objective or 0.0), row.name))
    write_json(folder / runs.SWEEP, {"metric": config.metric, "trials": [asdict(row) for row in rows]})
    return rows


def sweep_trial(run: Path, max_steps: int) -> SweepTrial:
    last = (judged(run) or [{}])[-1]
    return SweepTrial(
        name=run.name,
        parameters=read_json(run / PARAMETERS, remedy="Delete the trial's folder: the sweep makes it again."),
        status=status_of(run, max_steps),
        objective=last.get("objective"),
        step=last.get("step", 0),
        checkpoint=last.get("checkpoint_path", ""),
        error=(run / FAILED).read_text(errors="replace") if (run / FAILED).exists() else "",
    )


def table(rows: Sequence[SweepTrial], metric: str) -> str:
    """Plain text, best first, with the best checkpoint's path below."""
    names = sorted({name for row in rows for name in row.parameters})
    lines = ["  ".join([*(f"{n:>14}" for n in names), f"{metric:>20}", f"{'step':>8}", "status"])]
    for row in rows:
        objective = "-" if row.objective is None else f"{row.objective:.4f}"
        values = [f"{_short(row.parameters.get(n, '')):>14}" for n in names]
        status = f"{row.status}: {row.error}" if row.error else row.status
        lines.append("  ".join([*values, f"{objective:>20}", f"{row.step:>8}", status]))
    if rows and rows[0].checkpoint:
        lines += ["", f"best  {rows[0].checkpoint}"]
    return "\n".join(lines)
