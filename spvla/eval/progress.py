"""How an evaluation stands, kept up to date from what is new in the ledger: no look reads what an earlier one has read.

Several drivers may work on one ledger; each then sees the outcomes of all, since all are news.
"""

import time

from spvla.eval.console import EvaluationConsole, ProgressView, TaskCounts
from spvla.eval.driver import Driver
from spvla.eval.ledger import BEGINNING, Ledger
from spvla.eval.plan import Plan
from spvla.eval.settle import PairCounter, verdict
from spvla.types import Status, Trial

LOOK_EVERY_S = 0.5


class Progress:
    """Counts over the trials of a plan: by task and over all policies, and pairs where two policies are compared."""

    def __init__(self, plan: Plan, ledger: Ledger) -> None:
        self.plan, self.ledger = plan, ledger
        self.trials = frozenset(plan.trials)  # the ledger may hold others
        self._missing = dict.fromkeys(plan.trials)
        self.until = BEGINNING
        self.tasks = {task: TaskCounts(text) for task, text in plan.instructions.items()}
        for trial in plan.trials:
            self.tasks[trial.suite, trial.task].planned += 1
        self.pairs = PairCounter(*(v.digest for v in plan.versions)) if len(plan.versions) == 2 else None

    def refresh(self) -> None:
        """Counts what has come since the last time."""
        news = self.ledger.news(self.until)
        self.until = news.until
        for trial, status in news.outcomes:
            if trial not in self.trials:
                continue
            counts = self.tasks[trial.suite, trial.task]
            self._missing.pop(trial, None)
            counts.done += 1
            counts.successes += status == Status.SUCCESS
            if self.pairs is not None:
                self.pairs.add(trial, won=status == Status.SUCCESS)
        for trial in news.errors:
            if trial in self.trials:
                self.tasks[trial.suite, trial.task].errors += 1

    @property
    def missing(self) -> list[Trial]:
        """Trials of the plan without an outcome, in its order."""
        return list(self._missing)

    @property
    def settled(self) -> str:
        """Why the comparison of the plan's two versions needs no more trials, or nothing."""
        assert self.pairs is not None, "only a comparison of two is ever settled"
        found, pairs = self.pairs.count, len(self.plan.trials) // 2
        words = verdict(found.only_a, found.only_b, pairs_left=pairs - found.both)
        names = " and ".join(v.name for v in self.plan.versions)
        return f"{names}: settled after {found.both} of {pairs} pairs: {words}" if words else ""


class ProgressWatcher:
    """Looks at a run several times a second: shows it, and ends a comparison that is settled."""

    def __init__(
        self, progress: Progress, console: EvaluationConsole, *, batch_size: int, stop_when_settled: bool
    ) -> None:
        self.progress, self.console = progress, console
        self.view = ProgressView("evaluate", task_counts=progress.tasks, batch_size=batch_size)
        self.looked_at_s = -float("inf")
        self.settling = stop_when_settled

    def tick(self, driver: Driver) -> None:
        now = time.monotonic()
        if now - self.looked_at_s < LOOK_EVERY_S and not driver.scheduler.finished:
            return
        self.looked_at_s = now
        self.progress.refresh()
        self.view.made = driver.made
        self.view.workers, self.view.servers = len(driver.farm.workers.ready()), len(driver.farm.servers.ready())
        self.view.batches = driver.batch_stats()
        self.console.show(self.view, now=driver.scheduler.finished)
        if self.settling and (words := self.progress.settled):
            self.settling = False
            dropped = driver.drop(self.progress.plan.trials)
            self.console.say(f"evaluate  {words}; {dropped} trials left out")
