"""`spvla status RUN`: where a run stands, told from its folder alone, whether or not it is running."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spvla import runs
from spvla.config import StatusConfig
from spvla.eval.ledger import Ledger
from spvla.eval.summary import summarise
from spvla.files import expanded
from spvla.progress import format_seconds


def status(config: StatusConfig) -> None:
    """Prints a few lines. Raises UserError when `config.run` is no run folder."""
    for line in describe(expanded(config.run, flag="RUN")):
        print(line)


def describe(run: Path) -> Iterator[str]:
    written = runs.read_config(run)
    yield f"{run.resolve()}  (spvla {written['command']})"
    flags = written["config"]
    train = flags.get("train", flags)  # a sweep's are there
    max_steps = train.get("max_steps") if isinstance(train, dict) else None
    for folder in (run, *runs.iterations(run), *sorted(run.glob("trials/*/"))):
        if rows := list(runs.read_metrics(folder)):
            yield training_line(folder, rows[-1], max_steps)
    if (run / runs.LEDGER).exists():
        yield from evaluation_lines(run / runs.LEDGER)
    yield from iteration_rows(run)
    yield from sweep_rows(run)


def training_line(folder: Path, last: dict[str, Any], max_steps: int | None) -> str:
    ago = format_seconds(time.time() - (folder / runs.METRICS).stat().st_mtime)
    loss = f"  loss {last['total_loss']:.4f}" if last.get("total_loss") is not None else ""
    saved = runs.latest_checkpoint(folder)
    checkpoint = f"checkpoint {saved.name}" if saved else "no checkpoint yet"
    return f"training  {folder.name}  step {last['step']}/{max_steps}{loss}  {checkpoint}  last written {ago} ago"


def evaluation_lines(path: Path) -> Iterator[str]:
    with Ledger.open(path) as ledger:
        for s in summarise(ledger.trials()):
            if s.task is not None:
                continue
            rate = f"{s.rate:.1%}" if s.done else "-"
            lost = f", {s.errors} lost to errors" if s.errors else ""
            done = f"{s.done}/{s.planned} trials done, {s.successes} successes ({rate}){lost}"
            yield f"evaluation  {s.policy_name}  {s.suite}  {done}"


def iteration_rows(run: Path) -> Iterator[str]:
    for row in runs.read_history(run):
        yield f"iteration  {row['name']}  {row['successes']}/{row['trials']}  {row['verdict']}"


def sweep_rows(run: Path) -> Iterator[str]:
    """As the sweep's last table has them, best first."""
    told = runs.read_sweep(run)
    for row in told["trials"] if told else ():
        objective = "-" if row["objective"] is None else f"{row['objective']:.4f}"
        status = f"{row['status']}: {row['error']}" if row["error"] else row["status"]
        yield f"trial  {row['name']}  {told['metric']} {objective} at step {row['step']}  {status}"
