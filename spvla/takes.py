"""Takes on Ray actors, until each task has its episodes: which are due, who makes them, and what a crash costs.

A take that fails is made up for by another one. So is a take that crashes or hangs, which is not written down: the
next start of the command tries it again. Only where crashes outnumber successes does a recording end with an error.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing

import ray
from ray.exceptions import RayActorError, RayTaskError

from spvla.benchmarks.libero.recorders import Recorder
from spvla.cluster.machines import cpus_to_use, request_for, require_resources
from spvla.data.spool import Spool
from spvla.errors import InfrastructureError
from spvla.progress import Progress
from spvla.render.context import draw_on_gpu, draw_on_one_core
from spvla.types import Episode

Task = tuple[str, int]  # suite, number
Take = tuple[Task, int]  # task, number
DEATHS = 3  # of the process that makes one take, before that take is given up
HUNG_S = 1200.0  # after which a take's process is ended; eight attempts at the longest task take 60 s of one core
ENOUGH_CRASHES = 10  # to end a recording, if they outnumber its successes


class Tally:
    """Which takes are made, failed or due. Each task's first successes are kept, in whatever order they end."""

    def __init__(self, wanted: dict[Task, int], limits: dict[Task, int], done: dict[Take, bool]) -> None:
        self.wanted, self.limits, self.done = wanted, limits, dict(done)
        self.running: set[Take] = set()
        self.crashed: dict[Take, str] = {}  # why

    def due(self, task: Task) -> int | None:
        """The task's next take; None when enough are made or under way, or its limit is reached."""
        if self.successes(task) + self.under_way(task) >= self.wanted[task]:
            return None
        taken = {k for t, k in (*self.done, *self.running, *self.crashed) if t == task}
        return next((k for k in range(self.limits[task]) if k not in taken), None)

    def next(self, preferred: Task | None) -> Take | None:
        """The take that an idle worker should make, of its own task if that has any left."""
        for task in sorted(self.wanted, key=lambda task: (task != preferred, self.under_way(task), task)):
            if (take := self.due(task)) is not None:
                return task, take
        return None

    def under_way(self, task: Task) -> int:
        return sum(t == task for t, _ in self.running)

    def successes(self, task: Task) -> int:
        return sum(solved for (t, _), solved in self.done.items() if t == task)

    def tried(self, task: Task) -> int:
        return sum(t == task for t, _ in self.done)

    def kept(self) -> Iterator[Take]:
        for task, count in self.wanted.items():
            takes = sorted(k for (t, k), solved in self.done.items() if t == task and solved)
            yield from ((task, k) for k in takes[:count])

    def crash(self, take: Take, why: str) -> None:
        """Raises InfrastructureError where this is more than bad luck."""
        self.running.discard(take)
        self.crashed[take] = why
        if len(self.crashed) >= ENOUGH_CRASHES and len(self.crashed) > sum(self.done.values()):
            raise InfrastructureError(f"{len(self.crashed)} takes crashed, the last one so: {why}")


def gather(tally: Tally, spools: Mapping[str, Spool], make: Callable[[], Recorder], num_workers: int) -> None:
    """Runs takes on actors until none is due, and keeps each in its suite's spool.

    Raises a recorder's UserError, or InfrastructureError after crashes.
    """
    require_resources("recording", CPU=1)
    total = sum(tally.wanted.values())
    count = num_workers or cpus_to_use()
    with closing(Workers(make, count)) as workers, Progress("record", total=total, unit="episodes") as progress:
        show(progress, tally)
        while workers.start(tally):
            for take, episode in workers.finished():
                if isinstance(episode, str):
                    tally.crash(take, episode)
                    continue
                tally.running.discard(take)
                (suite, task), number = take
                spools[suite].put(task, number, episode)
                tally.done[take] = episode is not None
            show(progress, tally)


def show(progress: Progress, tally: Tally) -> None:
    made = sum(min(tally.successes(task), count) for task, count in tally.wanted.items())
    crashed = {"crashed": len(tally.crashed)} if tally.crashed else {}
    failed = sum(not solved for solved in tally.done.values())
    progress.update(made, takes=len(tally.done), failed=failed, **crashed)


class Workers:
    """At most `count` actors, each with the environment of its last task. A dead one's take is made again."""

    def __init__(self, make: Callable[[], Recorder], count: int) -> None:
        self.make, self.count = make, count
        self.idle: list[tuple[ray.actor.ActorHandle, Task | None]] = []
        self.busy: dict[ray.ObjectRef, tuple[ray.actor.ActorHandle, Take, float]] = {}
        self.deaths: dict[Take, int] = {}
        self.made = 0  # actors

    def start(self, tally: Tally) -> bool:
        """Gives idle actors their takes. False when nothing is due and nothing runs."""
        while len(self.busy) < self.count:
            actor, last = self.idle.pop() if self.idle else (None, None)
            take = tally.next(last)
            if take is None:
                if actor is not None:
                    self.idle.append((actor, last))
                break
            tally.running.add(take)
            self._run(actor or self._new(), take)
        return bool(self.busy)

    def _new(self) -> ray.actor.ActorHandle:
        place = request_for("spvla_env")
        self.made += 1
        return ray.remote(num_cpus=1, resources=place, max_restarts=0)(_Actor).remote(self.make, self.made)

    def _run(self, actor: ray.actor.ActorHandle, take: Take) -> None:
        self.busy[actor.record.remote(*take)] = actor, take, time.monotonic()

    def finished(self) -> Iterator[tuple[Take, Episode | str | None]]:
        """Waits for takes: an episode, None for a failure, or why it crashed. A dead process's take is made again."""
        ready, rest = ray.wait(list(self.busy), num_returns=1, timeout=HUNG_S / 10)
        for ref in (*ready, *(ref for ref in rest if time.monotonic() - self.busy[ref][2] > HUNG_S)):
            actor, take, _ = self.busy.pop(ref)
            try:
                episode = ray.get(ref, timeout=0)
            except RayTaskError as e:
                ray.kill(actor)
                if not isinstance(e.cause, InfrastructureError):
                    raise e.cause from None
                yield take, str(e.cause)
            except (RayActorError, ray.exceptions.GetTimeoutError) as e:
                ray.kill(actor)
                self.deaths[take] = self.deaths.get(take, 0) + 1
                if self.deaths[take] < DEATHS:
                    self._run(self._new(), take)
                else:
                    (suite, task), number = take
                    yield take, f"{suite} task {task}, take {number}: its process died or hung {DEATHS} times ({e})"
            else:
                self.idle.append((actor, take[0]))
                yield take, episode

    def close(self) -> None:
        for actor in [*(actor for actor, _, _ in self.busy.values()), *(actor for actor, _ in self.idle)]:
            ray.kill(actor)


class _Actor:
    """A recorder in a process of its own."""

    def __init__(self, make: Callable[[], Recorder], number: int) -> None:
        draw_on_one_core()
        draw_on_gpu(number)
        self.recorder = make()

    def record(self, task: Task, take: int) -> Episode | None:
        return self.recorder.record(*task, take)
