"""results.json and trials.csv beside the ledger, and a Weights & Biases table for those who keep one."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from spvla.config import EvaluateConfig
from spvla.farm.ledger import Ledger, TrialRow
from spvla.farm.summary import Summary, summarise
from spvla.files import write_json, write_text

RESULTS, TRIALS = "results.json", "trials.csv"


def export(ledger: Ledger) -> list[Path]:
    """Everything the ledger holds, for other programs. Returns the files written."""
    rows, folder = ledger.trials(), ledger.path.parent
    protocol = ledger.protocol()
    write_json(
        folder / RESULTS,
        {
            "protocol": asdict(protocol) if protocol else None,
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


def log_to_wandb(config: EvaluateConfig, summaries: Sequence[Summary], *, folder: Path, run_name: str) -> None:
    """One table of all tasks, and one number for each task and suite, under the original's names."""
    import wandb

    run = wandb.init(
        project=config.wandb_project,
        entity=config.wandb_entity,
        mode=config.wandb_mode,
        name=run_name,
        dir=str(folder),
        settings=wandb.Settings(silent=True),
    )
    columns = ["policy", "suite", "task", "instruction", "successes", "trials", "rate", "low", "high", "errors"]
    rows = [
        [s.policy_name, s.suite, -1 if s.task is None else s.task, s.instruction, s.successes, s.done, s.rate]
        + [*s.interval, s.errors]
        for s in summaries
    ]
    run.log({"results": wandb.Table(columns=columns, data=rows)})
    for s in summaries:
        where = "total" if s.task is None else s.instruction
        prefix = f"{s.policy_name}/{s.suite}/" if len({(x.policy, x.suite) for x in summaries}) > 1 else ""
        run.log({f"{prefix}success_rate/{where}": s.rate, f"{prefix}num_episodes/{where}": s.done})
    run.finish()
