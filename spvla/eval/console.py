"""What a person sees while the farm works: a table redrawn in place on a terminal, plain lines elsewhere."""

import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, TextIO

from spvla.eval.batcher import BatchStats
from spvla.progress import format_seconds

REDRAW_S = 0.5
LINE_EVERY_S = 10.0


@dataclass
class TaskCounts:
    """One task's counts, over all policies that are being evaluated."""

    instruction: str
    planned: int = 0
    done: int = 0
    successes: int = 0
    errors: int = 0  # infrastructure errors seen


@dataclass
class ProgressView:
    """The state of a run, as it is to be shown."""

    label: str
    task_counts: dict[tuple[str, int], TaskCounts] = field(default_factory=lambda: defaultdict(lambda: TaskCounts("")))
    made: int = 0  # trials that this process ended
    workers: int = 0
    servers: int = 0
    batches: BatchStats = field(default_factory=BatchStats)
    batch_size: int = 1  # of a full batch
    start_s: float = field(default_factory=time.monotonic)

    @property
    def planned(self) -> int:
        return sum(t.planned for t in self.task_counts.values())

    @property
    def done(self) -> int:
        return sum(t.done for t in self.task_counts.values())

    @property
    def per_minute(self) -> float:
        return self.made / max(1e-9, time.monotonic() - self.start_s) * 60

    def headline(self) -> str:
        done, planned = self.done, self.planned
        successes = sum(t.successes for t in self.task_counts.values())
        errors = sum(t.errors for t in self.task_counts.values())
        left = format_seconds((planned - done) / self.per_minute * 60) if self.made else "?"
        rate = f"{successes / done:.1%}" if done else "-"
        fill = min(1.0, self.batches.mean_size / self.batch_size)
        return (
            f"{self.label}  {done}/{planned} trials  success {rate}  errors {errors}  {self.per_minute:.1f} trials/min"
            f"  batch fill {fill:.0%}  {self.batches.actions} actions"
            f"  {self.workers} envs, {self.servers} policy actors  {left} left"
        )


class EvaluationConsole:
    """`with EvaluationConsole() as console: console.show(view)`; `say` prints a line that stays."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stderr
        self.shown_s = -float("inf")
        self.live: Any = None
        self.view: ProgressView | None = None

    def __enter__(self) -> "EvaluationConsole":
        if self.out.isatty():
            from rich.console import Console as RichConsole
            from rich.live import Live

            self.live = Live(console=RichConsole(file=self.out), auto_refresh=False)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def say(self, line: str) -> None:
        if self.live is not None:
            self.live.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=self.out, flush=True)

    def show(self, view: ProgressView, *, now: bool = False) -> None:
        due = REDRAW_S if self.live is not None else LINE_EVERY_S
        if not now and time.monotonic() - self.shown_s < due:
            return
        self.shown_s = time.monotonic()
        if self.live is not None:
            self.live.update(rich_table(view), refresh=True)
        else:
            print(view.headline(), file=self.out, flush=True)


def rich_table(view: ProgressView) -> object:
    """The headline first: what does not fit on a terminal is cut off below."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("task")
    for name in ("done", "success", "errors"):
        table.add_column(name, justify="right", no_wrap=True)
    for (suite, task), t in sorted(view.task_counts.items()):
        # no_wrap of the text, not of its column: rich narrows those that may wrap, and leaves the counts whole
        label = Text(f"{suite} {task} {t.instruction}", no_wrap=True, overflow="ellipsis")
        table.add_row(label, f"{t.done}/{t.planned}", str(t.successes), str(t.errors))
    return Group(Text(view.headline()), table)
