"""Micro-batching: full batches without idle waiting, by measured rates; answers reach who asked, errors too."""

import asyncio
import time
from collections.abc import Sequence

import pytest

from spvla.eval.batcher import Batcher, Cost, best_wait


class Server:
    """Answers n with 10 n, after `cost_s`; notes each batch."""

    def __init__(self, cost_s: float = 0.0) -> None:
        self.cost_s, self.batches = cost_s, []

    async def __call__(self, items: list[int]) -> Sequence[int]:
        self.batches.append(list(items))
        await asyncio.sleep(self.cost_s)
        if -1 in items:
            raise ValueError("no -1 here")
        return [10 * n for n in items]


async def client(batcher: Batcher[int, int], name: str, *, steps: int, think_s: float) -> list[int]:
    answers = []
    for n in range(steps):
        answers.append(await batcher.submit(n, client=name))
        await asyncio.sleep(think_s)
    batcher.rest(name)
    return answers


def test_each_answer_reaches_who_asked() -> None:
    async def scene() -> None:
        batcher = Batcher(Server(), size=3)
        answers = await asyncio.gather(*(batcher.submit(n, client=str(n)) for n in range(8)))
        assert answers == [10 * n for n in range(8)]

    asyncio.run(scene())


def test_no_batch_exceeds_its_size() -> None:
    async def scene() -> None:
        server = Server(0.001)
        batcher = Batcher(server, size=3)
        await asyncio.gather(*(client(batcher, str(c), steps=20, think_s=0) for c in range(7)))
        assert max(map(len, server.batches)) == 3
        assert sum(map(len, server.batches)) == batcher.stats().requests == 140

    asyncio.run(scene())


def test_a_lone_client_never_waits_for_company() -> None:
    async def scene() -> None:
        batcher = Batcher(Server(), size=8, wait_ms=10_000)
        start = time.monotonic()
        await client(batcher, "only", steps=20, think_s=0)
        assert time.monotonic() - start < 1

    asyncio.run(scene())


def test_a_batch_goes_when_everyone_is_in_it() -> None:
    async def scene() -> None:
        server = Server(0.02)
        batcher = Batcher(server, size=8)
        await asyncio.gather(*(client(batcher, str(c), steps=20, think_s=0.002) for c in range(4)))
        assert batcher.stats().mean_size > 3  # padding to 8 costs the same whoever is in: waiting 2 ms pays

    asyncio.run(scene())


def test_nobody_waits_for_a_client_that_went_to_rest() -> None:
    async def scene() -> None:
        batcher = Batcher(Server(0.001), size=2, wait_ms=60_000)
        quick = client(batcher, "quick", steps=50, think_s=0.001)
        brief = client(batcher, "brief", steps=3, think_s=0.001)
        await asyncio.wait_for(asyncio.gather(quick, brief), timeout=5)

    asyncio.run(scene())


def test_nobody_waits_long_for_a_client_that_vanished() -> None:
    async def scene() -> None:
        batcher = Batcher(Server(0.001), size=2)
        for n in range(5):  # asks steadily, then is gone without a word
            await batcher.submit(n, client="vanishing")
            await asyncio.sleep(0.002)
        await asyncio.wait_for(client(batcher, "left", steps=50, think_s=0.001), timeout=5)

    asyncio.run(scene())


def test_an_exception_reaches_its_batch_and_the_next_batch_goes_on() -> None:
    async def scene() -> None:
        batcher = Batcher(Server(), size=4)
        with pytest.raises(ValueError, match="no -1 here"):
            await batcher.submit(-1, client="a")
        assert await batcher.submit(2, client="a") == 20

    asyncio.run(scene())


class Device(Server):
    """Takes batches in turn, as a GPU's stream does."""

    def __init__(self, cost_s: float) -> None:
        super().__init__(cost_s)
        self.free, self.given, self.most = asyncio.Lock(), 0, 0

    async def __call__(self, items: list[int]) -> Sequence[int]:
        self.given += 1
        self.most = max(self.most, self.given)
        async with self.free:
            answers = await super().__call__(items)
        self.given -= 1
        return answers


def test_a_full_batch_stands_ready_behind_the_one_under_way() -> None:
    async def scene() -> None:
        device = Device(0.01)
        batcher, start = Batcher(device, size=2, depth=2), time.monotonic()
        await asyncio.gather(*(client(batcher, str(c), steps=10, think_s=0.001) for c in range(4)))
        assert device.most == 2
        assert batcher.stats().mean_size > 1.9
        assert batcher.stats().busy_s <= time.monotonic() - start  # the time behind another is not counted

    asyncio.run(scene())


def test_a_batch_that_is_not_full_waits_until_the_one_under_way_is_done() -> None:
    async def scene() -> None:
        device = Device(0.05)
        batcher = Batcher(device, size=2, depth=2)
        full = asyncio.gather(*(batcher.submit(n, client=str(n)) for n in range(2)))
        late = asyncio.create_task(batcher.submit(2, client="late"))
        await asyncio.sleep(0.02)
        assert device.batches == [[0, 1]] and device.given == 1
        assert await full == [0, 10] and await late == 20

    asyncio.run(scene())


def test_an_exception_in_one_of_two_batches_leaves_the_other_alone() -> None:
    async def scene() -> None:
        batcher = Batcher(Device(0.01), size=1, depth=2)
        bad, good = (asyncio.create_task(batcher.submit(n, client=str(n))) for n in (-1, 2))
        assert await good == 20
        with pytest.raises(ValueError, match="no -1 here"):
            await bad

    asyncio.run(scene())


def test_stats_tell_who_is_quiet_and_how_old_the_oldest_request_is() -> None:
    async def scene() -> None:
        batcher = Batcher(Server(0.05), size=1)
        await batcher.submit(1, client="done")
        await asyncio.sleep(0.02)
        waiting = asyncio.create_task(batcher.submit(2, client="waiting"))
        await asyncio.sleep(0.02)
        stats = batcher.stats()
        assert stats.quiet_s["waiting"] == 0 and stats.quiet_s["done"] > 0.03
        assert 0.01 < stats.oldest_wait_s < 0.05
        await waiting

    asyncio.run(scene())


def constant(n: int) -> float:
    return 0.1


def linear(n: int) -> float:
    return 0.02 * n


@pytest.mark.parametrize(
    ("waiting", "arrivals", "cost", "wait_s"),
    [
        (4, [], constant, 0.0),  # nobody to wait for
        (4, [0.01, 0.01, 0.01, 0.01], constant, 0.01),  # 8 in 0.11 s beats 4 in 0.1 s
        (4, [0.2, 0.2, 0.2, 0.2], constant, 0.0),  # 8 in 0.3 s does not
        (4, [0.01, 0.01, 0.01, 0.01], linear, 0.0),  # no economy of scale: the wait is lost
        (1, [0.05, 0.9], constant, 0.05),  # 2 in 0.15 s beats 1 in 0.1 s and 3 in 1 s
    ],
)
def test_waiting_pays_only_where_it_raises_the_rate(
    waiting: int, arrivals: list[float], cost: object, wait_s: float
) -> None:
    assert best_wait(waiting, arrivals, cost, size=8) == wait_s


def test_a_full_batch_waits_for_nobody() -> None:
    assert best_wait(4, [0.001], constant, size=4) == 0.0


def test_the_cost_of_a_batch_is_learned_from_its_sizes() -> None:
    cost = Cost(fixed=False)
    for n in (1, 4, 2, 8, 3):
        cost.add(n, 0.010 + 0.002 * n)
    assert cost(1) == pytest.approx(0.012) and cost(16) == pytest.approx(0.042)


def test_the_cost_of_padded_batches_is_their_mean() -> None:
    cost = Cost(fixed=True)
    for n in (1, 8):
        cost.add(n, 0.03)
    assert cost(1) == cost(8) == pytest.approx(0.03)
