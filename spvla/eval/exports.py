"""results.json and trials.csv beside the ledger, and a Weights & Biases run for those who keep one."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from spvla.benchmarks.registry import describe
from spvla.config import EvaluateConfig
from spvla.eval.ledger import Ledger, TrialRow
from spvla.eval.summary import Summary, summarise
from spvla.files import write_json, write_text
from spvla.tracking import WandbRun

RESULTS, TRIALS = "results.json", "trials.csv"
STEP = "checkpoint_step"


def export(ledger: Ledger) -> list[Path]:
    """Everything the ledger holds, for other programs. Returns the files written."""
    rows, folder = ledger.trials(), ledger.path.parent
    protocol = ledger.protocol()
    write_json(
        folder / RESULTS,
        {
            "world": describe(protocol.world) if protocol else None,
            "protocol": protocol.manifest() if protocol else None,
            "protocol_digest": protocol.digest if protocol else None,
            "policies": [asdict(p) for p in ledger.policies()],
            "results": [
                asdict(s) | {"rate": s.rate, "low": s.interval[0], "high": s.interval[1]} for s in summarise(rows)
            ],
            "errors": [asdict(e) for e in ledger.errors()],
        },
    )
    write_text(folder / TRIALS, as_csv(rows))
    return [folder / RESULTS, folder / TRIALS]


def as_csv(rows: Sequence[TrialRow]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(TrialRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()


def open_wandb(config: EvaluateConfig, *, folder: Path, name: str) -> WandbRun:
    """One run for all that a session evaluates. Raises UserError, before any trial is played, without a login."""
    opened = WandbRun(config, name=name, folder=folder)
    opened.run.define_metric("*", step_metric=STEP)  # checkpoints of a run may be evaluated newest first
    return opened


def log_results(opened: WandbRun, summaries: Sequence[Summary], *, step: int | None = None) -> None:
    """One table of all tasks, and one number for each task and suite, under the original's names.

    `step` of training places it on a curve.
    """
    import wandb

    columns = ["policy", "suite", "task", "instruction", "successes", "trials", "rate", "low", "high", "errors"]
    rows = [
        [s.policy_name, s.suite, -1 if s.task is None else s.task, s.instruction, s.successes, s.done, s.rate]
        + [*s.interval, s.errors]
        for s in summaries
    ]
    values: dict[str, Any] = {"results": wandb.Table(columns=columns, data=rows)}
    several = len({(s.policy, s.suite) for s in summaries}) > 1
    for s in summaries:
        where = "total" if s.task is None else s.instruction
        prefix = f"{s.policy_name}/{s.suite}/" if several else ""
        values |= {f"{prefix}success_rate/{where}": s.rate, f"{prefix}num_episodes/{where}": s.done}
    opened.log(values if step is None else values | {STEP: step})
