"""What one driver carries: the real ledger, scheduler, driver loop and progress, against simulated workers. No Ray.

    python bench/driver.py                                    # 2,000 workers, 100,000 trials, 1,000 a second: 2 minutes
    python bench/driver.py --workers 200 --trials 5000

Workers are entries of a queue, each of which answers a while after it was asked: mostly with an outcome, some with an
error, some die and start again, some policy servers die. All of it happens in the driver's process, so the simulation's
own time is part of what is reported; Ray's is not, and `--ray` measures what Ray asks for the same calls.

Times are CPU time of this process (user and system), so that other work on the machine does not count:
core_share   of one core, from the first trial to the last
tick_ms      of one round of the driver's loop: median, 99th percentile and maximum
report_s     of a summary, of all exports and of all that the report page is made of, from the finished ledger

Every outcome is checked at the end: as many as trials, each once, none of a dead worker.
"""

import argparse
import gc
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np

from spvla import runs
from spvla.config import FarmConfig
from spvla.eval.answers import Answer, Answers
from spvla.eval.batcher import BatchStats
from spvla.eval.console import EvaluationConsole
from spvla.eval.driver import Driver, EvaluationJob
from spvla.eval.exports import export
from spvla.eval.farm import Farm
from spvla.eval.ledger import Ledger
from spvla.eval.messages import EXCEPTION, POLICY_GONE, Fault, PolicyVersion, TrialOrder, TrialReport
from spvla.eval.plan import Plan
from spvla.eval.pool import ActorPool, ActorSlot
from spvla.eval.progress import Progress, ProgressWatcher
from spvla.eval.protocol import Protocol
from spvla.eval.sizing import Sizes
from spvla.eval.summary import summarise
from spvla.report.story import tell
from spvla.types import Outcome, Status, Trial

START_S = 1.0  # of a worker or server that is started again
DEATH = "the worker process died (simulated)"
VERSION = PolicyVersion(digest="5" * 64, name="simulated", path="simulated", base="simulated", is_adapter=False)
SUITES = ("suite_a", "suite_b", "suite_c", "suite_d")
TASKS = 10  # of a suite
STEPS = 220


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs.write_config(folder, "evaluate", FarmConfig())
        with Ledger.create(folder / runs.LEDGER) as ledger:
            found = play(args, ledger)
        found |= reports(folder)
        found["ledger_mib"] = (folder / runs.LEDGER).stat().st_size / 2**20
    if args.ray:
        found |= ray_calls(args.workers)
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}, indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2000)
    parser.add_argument("--servers", type=int, default=64)
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--per_second", type=float, default=1000.0, help="outcomes, while every worker has a trial")
    parser.add_argument("--errors", type=float, default=0.005, help="share of the trials that raise")
    parser.add_argument("--deaths", type=float, default=0.002, help="share of the trials under which a worker dies")
    parser.add_argument("--server_deaths", type=int, default=5, help="policy servers that die on the way")
    parser.add_argument("--ray", action="store_true", help="also what Ray asks for an order and its answer")
    return parser.parse_args()


class World:
    """What will be answered, and when: the simulated workers and servers altogether. It is the driver's `Answers`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rng = args, random.Random(0)
        self.mean_s = args.workers / args.per_second  # of a trial
        self.due: list[tuple[float, int]] = []  # (when, call)
        self.calls: dict[int, tuple[str, Answer]] = {}  # call -> who answers it, and what
        self.call_of: dict[str, int] = {}
        self.asked = 0

    def play(self, name: str, order: TrialOrder) -> int:
        """A worker's call: between half and one and a half mean trials later it has an end."""
        self.asked += 1
        heappush(self.due, (time.monotonic() + self.mean_s * self.rng.uniform(0.5, 1.5), self.asked))
        self.calls[self.asked] = name, self.end(order.trial)
        return self.asked

    def end(self, trial: Trial) -> Answer:
        luck = self.rng.random()
        if luck < self.args.deaths:
            return Answer(error=DEATH)
        if luck < self.args.deaths + self.args.errors:
            trace = "Traceback (most recent call last):\n" + '  File "simulated.py", line 1, in step\n' * 12
            fault = Fault(kind=EXCEPTION, message="a simulated error", traceback=trace, policy_at_fault=False)
            return Answer(value=TrialReport(fault=fault))
        won = trial.init_state % 3 > 0
        status, steps = (Status.SUCCESS, 100) if won else (Status.FAILURE, STEPS)
        outcome = Outcome(status=status, steps=steps, seconds=self.mean_s, state_digest=f"{trial.init_state:064x}")
        return Answer(value=TrialReport(outcome=outcome, rss_bytes=2**30))

    def lose(self, server: ActorSlot, driver: Driver) -> None:
        """A policy server dies: the trials that it played come back with a fault."""
        fault = Fault(kind=POLICY_GONE, message="simulated", traceback="", policy_at_fault=True)
        for name, running in driver.running.items():
            if running.server is server:
                self.calls[self.call_of[name]] = name, Answer(value=TrialReport(fault=fault))
        server.actor.dead = True

    # --- as spvla.eval.answers.Answers

    def expect(self, owner: str, reference: int) -> None:
        self.call_of[owner] = reference

    def forget(self, owner: str) -> None:
        self.calls.pop(self.call_of.pop(owner), None)

    def take(self, *, timeout_s: float, most: int) -> list[tuple[str, Answer]]:
        if self.due and (wait_s := self.due[0][0] - time.monotonic()) > 0:
            time.sleep(min(timeout_s, wait_s))
        now, taken = time.monotonic(), []
        while self.due and self.due[0][0] <= now and len(taken) < most:
            if (call := self.calls.pop(heappop(self.due)[1], None)) is not None:
                taken.append(call)
                del self.call_of[call[0]]
        return taken

    def poll(self, reference: Any) -> Answer:
        return reference


class Call:
    """As a method of an actor: `actor.method.remote(...)`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function


class SimulatedWorker:
    def __init__(self, world: World, name: str) -> None:
        self.started_s = time.monotonic()
        self.__ray_ready__ = Call(lambda: None)
        self.run = Call(lambda order, server: world.play(name, order))


class SimulatedServer:
    def __init__(self, world: World, name: str) -> None:
        self.started_s, self.dead = time.monotonic(), False
        self.__ray_ready__ = Call(lambda: None)
        self.stats, self.rest = Call(self.answer), Call(lambda worker: None)
        heard = range(world.args.workers // world.args.servers)
        self.known = BatchStats(batches=1, requests=32, actions=32, quiet_s={f"env-{i}": 0.1 for i in heard})

    def answer(self) -> Answer:
        return Answer(error="died (simulated)") if self.dead else Answer(value=self.known)


class SimulatedPool(ActorPool):
    """Slots, deaths and refills are the real pool's; only its three calls of Ray are not."""

    def started(self) -> Any:
        now = time.monotonic()
        for slot in self.slots:
            if slot.facts is None and slot.actor is not None and now - slot.actor.started_s > START_S:
                slot.placing, slot.facts, self.any_started = None, slot.name, True
                yield slot, ""

    def retire(self, slot: ActorSlot) -> None:
        slot.actor = slot.placing = slot.starting = slot.facts = None


class SimulatedFarm(Farm):
    """The real farm's upkeep over simulated pools."""

    def __init__(self, world: World) -> None:
        args = world.args
        self.config = FarmConfig(num_envs=args.workers, num_decoders=args.servers, num_videos=0, max_failure_videos=0)
        self.workers = SimulatedPool("env", lambda name: SimulatedWorker(world, name), None, 60.0)
        self.servers = SimulatedPool("policy", lambda name: SimulatedServer(world, name), None, 60.0)
        self.workers.grow_to(args.workers)
        self.servers.grow_to(args.servers)
        self.sizes = Sizes(envs=args.workers, decoders=args.servers, env_cpus=1.0, device="cpu")
        self.resized_at_s = float("inf")  # no cluster to ask
        self.logs: dict[str, Path] = {}
        self.said = 0

    def say(self, line: str) -> None:
        self.said += 1

    def _admit(self, pool: ActorPool, slot: ActorSlot) -> None:
        """All are alike."""


class Meter:
    """CPU time of each tick; memory and server deaths on the way."""

    def __init__(self, world: World, watcher: ProgressWatcher) -> None:
        self.world, self.watcher = world, watcher
        self.ticks: list[float] = []
        self.full: list[tuple[float, float, int]] = []  # (wall, CPU, made) while every worker may have a trial
        self.working: list[int] = []  # which ticks these are
        self.rss_mib: dict[int, float] = {}  # at each tenth of the trials
        self.cpu_s = time.process_time()

    def tick(self, driver: Driver) -> None:
        self.watcher.tick(driver)
        now_s = time.process_time()
        self.ticks.append(now_s - self.cpu_s)
        self.cpu_s = now_s
        args = self.world.args
        if driver.made > args.workers and driver.scheduler.num_pending:
            self.full.append((time.monotonic(), now_s, driver.made))
            self.working.append(len(self.ticks) - 1)
        tenth = 10 * driver.made // args.trials
        if tenth not in self.rss_mib:
            self.rss_mib[tenth] = rss_mib()
            if 0 < tenth <= args.server_deaths:
                self.world.lose(self.world.rng.choice(driver.farm.servers.ready()), driver)


def play(args: argparse.Namespace, ledger: Ledger) -> dict[str, Any]:
    places = [(suite, task) for suite in SUITES for task in range(TASKS)]
    wanted = [
        Trial(policy=VERSION.digest, suite=suite, task=task, init_state=i)
        for suite, task in places
        for i in range(args.trials // len(places))
    ]
    plan = Plan(
        versions=[VERSION],
        trials=wanted,
        unnorm_keys={(VERSION.digest, suite): suite for suite in SUITES},
        instructions={(suite, task): f"do what task {task} of {suite} asks" for suite, task in places},
    )
    job = register(ledger, plan)
    world = World(args)
    meter = None
    with EvaluationConsole(sys.stderr) as console:
        watcher = ProgressWatcher(Progress(plan, ledger), console, batch_size=32, stop_when_settled=False)
        driver = Driver(SimulatedFarm(world), job, ledger, answers=world)
        gc.collect()
        meter = Meter(world, watcher)
        start_s, cpu_s = time.monotonic(), time.process_time()
        driver.play(meter.tick)
    wall_s, cpu_s = time.monotonic() - start_s, time.process_time() - cpu_s
    check(ledger, driver, wanted)
    (from_s, from_cpu_s, from_made), (to_s, to_cpu_s, to_made) = meter.full[0], meter.full[-1]
    ticks_ms = 1000 * np.array(meter.ticks)
    return {
        "trials": len(wanted),
        "workers": args.workers,
        "outcomes_per_second": (to_made - from_made) / (to_s - from_s),
        "core_share": (to_cpu_s - from_cpu_s) / (to_s - from_s),
        "cpu_ms_per_trial": 1000 * cpu_s / len(wanted),
        "wall_s": wall_s,
        "ticks": len(ticks_ms),
        "tick_ms": {
            "median": round(float(np.median(ticks_ms)), 2),
            "p99": round(float(np.percentile(ticks_ms, 99)), 2),
            "max": round(float(ticks_ms.max()), 2),
            "max_while_all_work": round(float(ticks_ms[meter.working].max()), 2),
        },
        "errors": len(ledger.errors()),
        "rss_mib": {f"{10 * k}%": round(v) for k, v in meter.rss_mib.items()},
    }


def register(ledger: Ledger, plan: Plan) -> EvaluationJob:
    protocol = Protocol(
        world={"benchmark": "bench/driver.py"},
        num_steps_wait=10,
        center_crop=True,
        seed=0,
        device="cpu",
        dtype="float32",
        decode_batch_size=1,
    )
    ledger.add_protocol(protocol)
    ledger.add_policy(VERSION.digest, name=VERSION.name, path=VERSION.path)
    ledger.add_tasks(plan.instructions)
    ledger.add_trials(protocol.digest, plan.trials)
    return EvaluationJob(
        protocol=protocol.digest,
        trials=plan.trials,
        needs={VERSION.digest: VERSION.needs},
        unnorm_keys=plan.unnorm_keys,
        instructions=plan.instructions,
        steps_limit=dict.fromkeys(SUITES, STEPS),
    )


def check(ledger: Ledger, driver: Driver, wanted: list[Trial]) -> None:
    news = ledger.news()
    ended = [trial for trial, _ in news.outcomes]
    assert len(ended) == len(set(ended)) == driver.made, "an outcome was written twice"
    assert set(ended) | set(driver.scheduler.given_up) == set(wanted), "a trial was lost"
    assert all((status == Status.SUCCESS) == (trial.init_state % 3 > 0) for trial, status in news.outcomes)


def reports(folder: Path) -> dict[str, float]:
    """CPU seconds of everything that reads a whole ledger."""
    found = {}
    with Ledger.open(folder / runs.LEDGER) as ledger:
        for name, work in (
            ("open_s", lambda: Ledger.open(folder / runs.LEDGER).close()),
            ("summary_s", lambda: summarise(ledger.trials())),
            ("export_s", lambda: export(ledger)),
            ("report_s", lambda: tell(folder)),
        ):
            start_s = time.process_time()
            work()
            found[name] = time.process_time() - start_s
    return found


def ray_calls(workers: int) -> dict[str, float]:
    """CPU milliseconds of this process: of an order and its answer, and of looking through all that are awaited."""
    import ray

    from spvla.cluster.connect import connection

    class Idle:
        async def run(self, order: object, server: object) -> TrialReport:
            return TrialReport(rss_bytes=1)

        async def never(self) -> None:
            import asyncio

            await asyncio.sleep(3600)

    with connection():
        actor = ray.remote(Idle).options(num_cpus=0, max_concurrency=2 * workers).remote()
        trial = Trial(policy=VERSION.digest, suite=SUITES[0], task=0, init_state=0)
        order = TrialOrder(trial=trial, needs=VERSION.needs, unnorm_key="", max_steps=1, film=frozenset())
        ray.get(actor.run.remote(order, actor))
        answers, start_s = Answers(), time.process_time()
        for i in range(workers):
            answers.expect(f"env-{i}", actor.run.remote(order, actor))
        got = 0
        while got < workers:
            time.sleep(0.05)
            got += len(answers.take(timeout_s=1.0, most=workers))
        call_ms = 1000 * (time.process_time() - start_s) / workers
        for i in range(workers):
            answers.expect(f"env-{i}", actor.never.remote())
        answers.expect("done", ray.put(1))
        start_s = time.process_time()
        assert [owner for owner, _ in answers.take(timeout_s=1.0, most=workers)] == ["done"]
        return {"ray_call_ms": call_ms, "ray_wait_ms": 1000 * (time.process_time() - start_s)}


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
