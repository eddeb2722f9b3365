"""Which trial next, for which worker: a plain class that knows neither Ray nor files nor clocks.

A worker keeps its task while the task has work, because opening another costs seconds. A worker without a task gets
the one with most work for each worker that is at it: longest first, and later helping the others out. A trial that
fell to an infrastructure error goes back to pending, is tried on another worker, and is given up after its retries.

Handing out costs O(log tasks), however many workers and trials there are. The tasks lie in a heap by their need of
workers. One whose need grew is entered anew, and its older entry is void; one whose need shrank is found out at the
top and entered again.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from spvla.types import Trial

Task = tuple[str, int]  # suite, task
Entry = tuple[float, Task, int]  # need, negated; the task; its how-manieth entry this is


@dataclass
class Scheduler:
    """`next` hands a trial out; exactly one of `done`, `failed` or `skip` must follow for each."""

    steps_limit: dict[str, int]  # suite -> steps of its longest trial: the measure of work
    max_retries: int
    num_pending: int = 0
    running: dict[str, Trial] = field(default_factory=dict)  # worker -> trial
    errors: Counter[Trial] = field(default_factory=Counter)
    blamed: dict[Trial, set[str]] = field(default_factory=lambda: defaultdict(set))  # workers it fell on
    given_up: list[Trial] = field(default_factory=list)
    _pending: dict[Task, deque[Trial]] = field(default_factory=lambda: defaultdict(deque))
    _task_of: dict[str, Task] = field(default_factory=dict)  # worker -> the task it holds open
    _workers_at: Counter[Task] = field(default_factory=Counter)  # how many hold it open
    _heap: list[Entry] = field(default_factory=list)
    _entered: Counter[Task] = field(default_factory=Counter)  # how often a task was entered: the last entry counts

    def add(self, trials: Iterable[Trial]) -> None:
        touched: dict[Task, None] = {}
        for trial in trials:
            task = trial.suite, trial.task
            self._pending[task].append(trial)
            self.num_pending += 1
            touched[task] = None
        for task in touched:
            self._enter(task)

    @property
    def unfinished(self) -> int:
        return len(self.running) + self.num_pending

    @property
    def finished(self) -> bool:
        return self.unfinished == 0

    def next(self, worker: str, workers: Collection[str]) -> Trial | None:
        """A trial for `worker`, which is one of the living `workers`; None if it can do nothing now."""
        assert worker not in self.running, f"{worker} has a trial"
        own = self._task_of.get(worker)
        if own is not None and (trial := self._take(own, worker, workers)) is not None:
            self.running[worker] = trial
            return trial
        passed: list[Entry] = []  # tasks whose every pending trial fell on this worker before
        trial = None
        while trial is None and (entry := self._neediest()) is not None:
            passed.append(entry)
            trial = self._take(entry[1], worker, workers)
        if trial is not None:
            self.running[worker] = trial
            self._hold(worker, (trial.suite, trial.task))
        for entry in passed:
            heappush(self._heap, entry)
        return trial

    def done(self, worker: str) -> Trial:
        return self.running.pop(worker)

    def skip(self, worker: str) -> Trial:
        """The trial is someone else's: forget it."""
        return self.running.pop(worker)

    def failed(self, worker: str, *, died: bool) -> bool:
        """An infrastructure error. True: the trial will be tried again. `died`: the worker's open task is lost."""
        trial = self.running.pop(worker)
        if died:
            self.leave(worker)
        self.errors[trial] += 1
        self.blamed[trial].add(worker)
        if self.errors[trial] > self.max_retries:
            self.given_up.append(trial)
            return False
        self.add([trial])
        return True

    def leave(self, worker: str) -> None:
        """The worker's open task is lost, as its process is."""
        if (task := self._task_of.pop(worker, None)) is not None:
            self._workers_at[task] -= 1
            self._enter(task)

    def drop(self, trials: Collection[Trial]) -> int:
        """Takes trials off the list that nobody has begun; returns how many."""
        gone = set(trials)
        before = self.num_pending
        for task, queue in self._pending.items():
            self._pending[task] = deque(t for t in queue if t not in gone)
        self.num_pending = sum(map(len, self._pending.values()))
        return before - self.num_pending

    def _hold(self, worker: str, task: Task) -> None:
        if self._task_of.get(worker) != task:
            self.leave(worker)
            self._task_of[worker] = task
            self._workers_at[task] += 1

    def _take(self, task: Task, worker: str, workers: Collection[str]) -> Trial | None:
        queue = self._pending[task]
        for i, trial in enumerate(queue):
            if self._may_try(trial, worker, workers):
                del queue[i]
                self.num_pending -= 1
                return trial
        return None

    def _may_try(self, trial: Trial, worker: str, workers: Collection[str]) -> bool:
        """It has not fallen on this worker, or else on every living one."""
        fell_on = self.blamed.get(trial, ())
        return worker not in fell_on or (len(fell_on) >= len(workers) and all(w in fell_on for w in workers))

    def _need(self, task: Task) -> float:
        """Pending work for each worker that would be at the task with one more."""
        return len(self._pending[task]) * self.steps_limit[task[0]] / (self._workers_at[task] + 1)

    def _enter(self, task: Task) -> None:
        self._entered[task] += 1
        if self._pending[task]:
            heappush(self._heap, (-self._need(task), task, self._entered[task]))
        if len(self._heap) > 64 + 2 * len(self._pending):
            self._heap = [e for e in self._heap if e[2] == self._entered[e[1]]]
            heapify(self._heap)

    def _neediest(self) -> Entry | None:
        """Takes the entry of the task with most need off the heap; of equal ones the first by name."""
        while self._heap:
            entry = heappop(self._heap)
            need, task, number = entry
            if number != self._entered[task] or not self._pending[task]:
                continue
            if need == -self._need(task):
                return entry
            heappush(self._heap, (-self._need(task), task, number))
        return None
