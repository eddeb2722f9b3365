"""Micro-batching: many callers wait for one answer each, one function answers them together.

A batch closes when it is full, when everyone who could still join is already in it, or when waiting longer would lower
the rate of answers. That last point needs two measured quantities: how long a batch takes (by its size) and how long
each client takes from an answer to its next request. Behind a batch under way the next may stand ready, if it is full:
then a GPU need not wait for the host. Plain asyncio: no cluster, no torch, no clock of its own.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")

SMOOTHING = 0.2  # weight of the newest measurement in a running mean
PATIENCE = 2.0  # a client this many times later than its mean is off doing something else: a reset, a hang
SLACK_S = 0.002  # and clock noise


@dataclass
class Client:
    """One caller, which asks, waits, is answered, and asks again `think_s` later."""

    think_s: float | None = None  # running mean from an answer to the next request
    answered_at_s: float | None = None  # None: it waits now

    def expected_in_s(self, now_s: float) -> float | None:
        """Seconds until its next request; None when it is not expected."""
        if self.answered_at_s is None or self.think_s is None:
            return None
        gone = now_s - self.answered_at_s
        if gone > PATIENCE * self.think_s + SLACK_S:
            return None
        return max(self.think_s - gone, 0.25 * self.think_s)


@dataclass
class Cost:
    """Seconds that a batch of n takes: a running mean if every batch is padded to one size, else a fitted a + b n."""

    fixed: bool
    weight: float = 0.0
    n: float = 0.0
    nn: float = 0.0
    s: float = 0.0
    ns: float = 0.0

    def add(self, n: int, seconds: float) -> None:
        keep = 1 - SMOOTHING
        self.weight = keep * self.weight + 1
        self.n, self.nn = keep * self.n + n, keep * self.nn + n * n
        self.s, self.ns = keep * self.s + seconds, keep * self.ns + n * seconds

    def __call__(self, n: int) -> float:
        """Weighted least squares; a slope below 0 is noise."""
        if self.weight == 0:
            return 0.0
        mean_n, mean_s = self.n / self.weight, self.s / self.weight
        spread = self.nn / self.weight - mean_n**2
        if self.fixed or spread < 1e-9:
            return mean_s
        slope = max(0.0, (self.ns / self.weight - mean_n * mean_s) / spread)
        return max(1e-6, mean_s + slope * (n - mean_n))


def best_wait(waiting: int, arrivals: Sequence[float], cost: Callable[[int], float], size: int) -> float:
    """Seconds to wait so that answers a second, batch and wait together, are most.

    `arrivals` are the seconds until each absent client is expected, ascending. Going now answers `waiting` in
    cost(waiting); waiting for the k-th arrival answers k more in that much longer.
    """
    best, wait_s = waiting / max(cost(waiting), 1e-9), 0.0
    for k, after in enumerate(arrivals[: max(0, size - waiting)], start=1):
        rate = (waiting + k) / (after + max(cost(waiting + k), 1e-9))
        if rate > best:
            best, wait_s = rate, after
    return wait_s


@dataclass
class BatchStats:
    """Counts since the start, for rates and for the mean batch fill."""

    batches: int = 0
    requests: int = 0
    actions: int = 0  # that those who asked were given to execute
    busy_s: float = 0.0
    oldest_wait_s: float = 0.0  # age of the request that has waited longest, in a batch or for one
    quiet_s: dict[str, float] = field(default_factory=dict)  # client -> seconds since its last answer; 0 while it waits

    @property
    def mean_size(self) -> float:
        return self.requests / self.batches if self.batches else 0.0


@dataclass
class _Request(Generic[Item]):
    item: Item
    client: str
    arrived_at_s: float
    answer: asyncio.Future[Any]


class Batcher(Generic[Item, Answer]):
    """`await submit(item, client=...)` -> answer. `serve` gets up to `size` items and returns as many answers.

    An exception in `serve` reaches every caller of that batch, and the next batch goes on. `wait_ms` replaces the
    tuned wait by a fixed one, counted from the oldest request. `fixed_cost`: every batch is padded to one size.
    `depth`: batches under way at once, which `serve` must take in turn.
    """

    def __init__(
        self,
        serve: Callable[[list[Item]], Awaitable[Sequence[Answer]]],
        *,
        size: int,
        wait_ms: float | None = None,
        fixed_cost: bool = True,
        depth: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert size >= 1 and depth >= 1
        self._serve, self._size, self._depth, self._clock = serve, size, depth, clock
        self._wait_s = None if wait_ms is None else wait_ms / 1000
        self._cost = Cost(fixed=fixed_cost)
        self._clients: dict[str, Client] = {}
        self._queue: list[_Request[Item]] = []
        self._under_way: dict[asyncio.Task[None], list[_Request[Item]]] = {}
        self._free_at_s = 0.0  # when the last batch was done
        self._arrived = asyncio.Event()
        self._totals = BatchStats()
        self._task: asyncio.Task[None] | None = None

    async def submit(self, item: Item, *, client: str) -> Answer:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        now = self._clock()
        self._note_request(client, now)
        request = _Request(item, client, now, asyncio.get_running_loop().create_future())
        self._queue.append(request)
        self._arrived.set()
        return await request.answer

    def rest(self, client: str) -> None:
        """The client will not ask for a while: nobody waits for it."""
        self._clients.pop(client, None)
        self._arrived.set()

    def stats(self) -> BatchStats:
        now, t = self._clock(), self._totals
        waiting = [*chain(*self._under_way.values()), *self._queue]
        oldest = max((now - r.arrived_at_s for r in waiting), default=0.0)
        quiet = {n: 0.0 if c.answered_at_s is None else now - c.answered_at_s for n, c in self._clients.items()}
        return replace(t, oldest_wait_s=oldest, quiet_s=quiet)

    async def close(self) -> None:
        for task in (self._task, *self._under_way):
            if task is not None:
                task.cancel()

    def _note_request(self, name: str, now: float) -> None:
        client = self._clients.setdefault(name, Client())
        if client.answered_at_s is not None:
            think = now - client.answered_at_s
            client.think_s = think if client.think_s is None else client.think_s + SMOOTHING * (think - client.think_s)
        client.answered_at_s = None

    async def _run(self) -> None:
        while True:
            await self._until_closed()
            batch, self._queue = self._queue[: self._size], self._queue[self._size :]
            task = asyncio.get_running_loop().create_task(self._answer(batch))
            self._under_way[task] = batch
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._under_way[task]
        self._arrived.set()

    async def _until_closed(self) -> None:
        """Returns when the queue holds a batch that should go."""
        while True:
            self._arrived.clear()
            wait_s = self._longest_wait_s()
            if wait_s is not None and wait_s <= 0:
                return
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout=wait_s)
            except TimeoutError:
                continue  # the wait is over, or someone did not come: decide anew

    def _longest_wait_s(self) -> float | None:
        """Seconds the queue may still wait for company; None: until something happens."""
        waiting, now = len(self._queue), self._clock()
        if waiting == 0 or len(self._under_way) >= self._depth or (self._under_way and waiting < self._size):
            return None  # a batch that is not full gains nothing by going early
        arrivals = sorted(e for c in self._clients.values() if (e := c.expected_in_s(now)) is not None)
        if waiting >= self._size or not arrivals:
            return 0.0
        if self._wait_s is not None:
            return self._queue[0].arrived_at_s + self._wait_s - now
        return best_wait(waiting, arrivals, self._cost, self._size)

    async def _answer(self, batch: list[_Request[Item]]) -> None:
        start = self._clock()
        try:
            answers: Sequence[Answer | Exception] = await self._serve([r.item for r in batch])
            assert len(answers) == len(batch), f"{len(answers)} answers to {len(batch)} requests"
        except Exception as e:
            answers = [e] * len(batch)
        now = self._clock()
        taken_s = now - max(start, self._free_at_s)  # until the batch before was done, this one only waited
        self._free_at_s = now
        self._cost.add(len(batch), taken_s)
        self._totals.batches += 1
        self._totals.requests += len(batch)
        self._totals.busy_s += taken_s
        for request, answer in zip(batch, answers, strict=True):
            if client := self._clients.get(request.client):
                client.answered_at_s = now
            if request.answer.done():
                continue  # the caller went away
            if isinstance(answer, Exception):
                request.answer.set_exception(answer)
            else:
                request.answer.set_result(answer)
