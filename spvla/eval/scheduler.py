"""Which trial next, for which worker: a plain class that knows neither Ray nor files nor clocks.

A worker keeps its task while the task has work, because opening another costs seconds. A worker without a task gets
the one with most work for each worker that is at it: longest first, and later helping the others out. A trial that
fell to an infrastructure error goes back to pending, is tried on another worker, and is given up after its retries.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from spvla.types import Trial

Task = tuple[str, int]  # suite, task


@dataclass
class Scheduler:
    """`next` hands a trial out; exactly one of `done`, `failed` or `skip` must follow for each."""

    steps_limit: dict[str, int]  # suite -> steps of its longest trial: the measure of work
    max_retries: int
    pending: dict[Task, deque[Trial]] = field(default_factory=lambda: defaultdict(deque))
    running: dict[str, Trial] = field(default_factory=dict)  # worker -> trial
    errors: dict[Trial, int] = field(default_factory=lambda: defaultdict(int))
    blamed: dict[Trial, set[str]] = field(default_factory=lambda: defaultdict(set))  # workers it fell on
    given_up: list[Trial] = field(default_factory=list)
    task_of: dict[str, Task] = field(default_factory=dict)  # worker -> the task it holds open

    def add(self, trials: Iterable[Trial]) -> None:
        for trial in trials:
            self.pending[trial.suite, trial.task].append(trial)

    @property
    def num_pending(self) -> int:
        return sum(map(len, self.pending.values()))

    @property
    def unfinished(self) -> int:
        return len(self.running) + self.num_pending

    @property
    def finished(self) -> bool:
        return self.unfinished == 0

    def next(self, worker: str, workers: Collection[str]) -> Trial | None:
        """A trial for `worker`, which is one of the living `workers`; None if it can do nothing now."""
        assert worker not in self.running, f"{worker} has a trial"
        own = self.task_of.get(worker)
        others = sorted(self.pending, key=lambda t: (-self._need(t, worker), t))
        for task in (own, *others) if own in self.pending else others:
            if task is not None and (trial := self._take(task, worker, workers)) is not None:
                self.running[worker], self.task_of[worker] = trial, task
                return trial
        return None

    def done(self, worker: str) -> Trial:
        return self.running.pop(worker)

    def skip(self, worker: str) -> Trial:
        """The trial is someone else's: forget it."""
        return self.running.pop(worker)

    def failed(self, worker: str, *, died: bool) -> bool:
        """An infrastructure error. True: the trial will be tried again. `died`: the worker's open task is lost."""
        trial = self.running.pop(worker)
        if died:
            self.task_of.pop(worker, None)
        self.errors[trial] += 1
        self.blamed[trial].add(worker)
        if self.errors[trial] > self.max_retries:
            self.given_up.append(trial)
            return False
        self.pending[trial.suite, trial.task].append(trial)
        return True

    def drop(self, trials: Collection[Trial]) -> int:
        """Takes trials off the list that nobody has begun; returns how many."""
        gone = set(trials)
        before = self.num_pending
        for task, queue in list(self.pending.items()):
            self.pending[task] = deque(t for t in queue if t not in gone)
        return before - self.num_pending

    def _need(self, task: Task, worker: str) -> float:
        """Pending work for each worker that would be at the task."""
        at_it = sum(1 for w, t in self.task_of.items() if t == task and w != worker)
        return len(self.pending[task]) * self.steps_limit[task[0]] / (at_it + 1)

    def _take(self, task: Task, worker: str, workers: Collection[str]) -> Trial | None:
        queue = self.pending[task]
        for i, trial in enumerate(queue):
            if worker not in self.blamed[trial] or not set(workers) - self.blamed[trial]:
                del queue[i]
                return trial
        return None
