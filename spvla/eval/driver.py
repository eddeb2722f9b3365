"""One job on the farm: hands out trials, watches everything, writes what comes of it.

The driver is in no step's way: it hands out whole trials and takes whole outcomes. It is the only writer of its
ledger.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from spvla.eval.batcher import BatchStats
from spvla.eval.farm import Farm
from spvla.eval.ledger import Ledger
from spvla.eval.messages import POLICY_RAISED, Fault, TrialOrder, TrialReport
from spvla.eval.pool import POLL_S, ActorSlot, cause_of_death, first_line, tail
from spvla.eval.scheduler import Scheduler
from spvla.eval.videos import FilmQuota, video_name
from spvla.files import safe_name
from spvla.runs import VIDEOS
from spvla.types import Needs, Outcome, Status, Trial

WATCH_EVERY_S = 1.0
HEARTBEAT_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """Trials to be played, and what is needed to play and to name them."""

    protocol: str  # digest
    trials: Sequence[Trial]
    needs: dict[str, Needs]  # policy digest -> what it must be shown
    unnorm_keys: dict[tuple[str, str], str]  # (policy digest, suite) -> key
    instructions: dict[tuple[str, int], str]  # (suite, task) -> text
    steps_limit: dict[str, int]  # suite -> steps


@dataclass
class RunningTrial:
    """A trial on its way, with the worker that plays it."""

    order: TrialOrder
    server: str
    quiet_since_s: float  # the worker owes a request since: it resets, or executes what it was given


@dataclass
class ServerHealth:
    """What is known of a policy server from its last answer."""

    stats: BatchStats = field(default_factory=BatchStats)
    asked: ray.ObjectRef | None = None
    asked_at_s: float = 0.0
    suspect: bool = False  # a worker could not reach it: no trial until it has answered


class Driver:
    """`Driver(farm, job, ledger).play()`: returns when each trial has an outcome or was given up."""

    def __init__(self, farm: Farm, job: EvaluationJob, ledger: Ledger) -> None:
        self.farm, self.job, self.ledger = farm, job, ledger
        self.scheduler = Scheduler(steps_limit=job.steps_limit, max_retries=farm.config.max_retries)
        self.scheduler.add(job.trials)
        self.quota = film_quota(ledger, successes=farm.config.num_videos, failures=farm.config.max_failure_videos)
        self.running: dict[str, RunningTrial] = {}  # worker -> its trial
        self.reports: dict[ray.ObjectRef, str] = {}  # -> worker
        self.claimed_elsewhere: list[Trial] = []  # claimed by another driver
        self.health: dict[str, ServerHealth] = {}  # policy server -> what is known of it
        self.past = BatchStats()  # of policy servers that are gone
        self.made = 0  # outcomes written by this run
        self.heartbeat_at_s = self.watched_at_s = 0.0

    def play(self, on_tick: Callable[["Driver"], None] = lambda driver: None) -> None:
        """Raises InfrastructureError when nobody is left, LedgerError when it cannot write.

        `on_tick` is called several times a second, and may drop trials from the scheduler.
        """
        try:
            while not self.scheduler.finished or self.claimed_elsewhere:
                self.farm.trials_left = self.scheduler.unfinished + len(self.claimed_elsewhere)
                self.farm.maintain()
                self._dispatch()
                self._collect()
                self._watch()
                if self.scheduler.finished:
                    self._take_back_from_others()
                on_tick(self)
        finally:
            self._release_all()

    def drop(self, trials: Sequence[Trial]) -> int:
        """Leaves out those that nobody has begun; returns how many."""
        gone = set(trials)
        self.claimed_elsewhere = [t for t in self.claimed_elsewhere if t not in gone]
        return self.scheduler.drop(trials)

    def batch_stats(self) -> BatchStats:
        """Over all policy servers, since they started."""
        return total([self.past, *(w.stats for w in self.health.values())])

    def _dispatch(self) -> None:
        """Gives each idle worker a trial, from the policy server that has fewest."""
        servers = [s for s in self.farm.servers.ready() if not self._health_of(s).suspect]
        ready = self.farm.workers.ready()
        living = [s.name for s in ready]
        for slot in ready if servers else ():
            if slot.name in self.running or (trial := self._claimed(slot.name, living)) is None:
                continue
            key = self.job.unnorm_keys[trial.policy, trial.suite]
            needs = self.job.needs[trial.policy]
            limit = self.job.steps_limit[trial.suite]
            film = self.quota.begin(trial)
            order = TrialOrder(trial=trial, needs=needs, unnorm_key=key, max_steps=limit, film=film)
            server = min(servers, key=lambda s: sum(w.server == s.name for w in self.running.values()))
            self.reports[slot.actor.run.remote(order, server.actor)] = slot.name
            self.running[slot.name] = RunningTrial(order, server.name, time.monotonic())

    def _claimed(self, worker: str, living: Sequence[str]) -> Trial | None:
        """The worker's next trial, ours alone; those that another driver has are put aside."""
        while (trial := self.scheduler.next(worker, living)) is not None:
            if self.ledger.claim(self.job.protocol, trial):
                return trial
            self.claimed_elsewhere.append(self.scheduler.skip(worker))
        return None

    def _collect(self) -> None:
        """Books what has come back."""
        if not self.reports:
            time.sleep(POLL_S / 4)
            return
        references = list(self.reports)
        ray.wait(references, num_returns=1, timeout=POLL_S)
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in ready:
            slot = self._worker(self.reports.pop(reference))
            try:
                report: TrialReport = ray.get(reference)
            except ray.exceptions.RayError as e:
                self._worker_died(slot, kind="environment died", message=str(e))
                continue
            if report.fault is not None:
                self._fault(slot.name, report.fault, died=False)
            elif report.outcome is not None:
                self._done(slot, report, report.outcome)

    def _done(self, slot: ActorSlot[Any], report: TrialReport, outcome: Outcome) -> None:
        running = self.running.pop(slot.name)
        trial = self.scheduler.done(slot.name)
        video = self._keep_video(trial, outcome.status, report.video) if report.video else ""
        if report.no_video:
            self._say_no_video(trial, report.no_video)
        if self.ledger.record(self.job.protocol, trial, outcome, video=video, worker=slot.name):
            self.made += 1
        else:
            self.claimed_elsewhere.append(trial)  # our claim had lapsed: whoever took it may yet give it back
        self.quota.end(trial, running.order.film, outcome.status if video else None)
        slot.deaths = 0
        for server in self.farm.servers.slots:
            server.deaths = 0 if server.name == running.server else server.deaths
        if report.rss_bytes > self.farm.config.worker_memory_gb * 2**30:
            self.farm.say(f"{slot.name} holds {report.rss_bytes / 2**30:.1f} GiB: replaced")
            self.farm.workers.retire(slot)
            self.scheduler.task_of.pop(slot.name, None)

    def _worker_died(self, slot: ActorSlot[Any], *, kind: str, message: str) -> None:
        """A worker died, or hangs and is ended."""
        log = self.farm.logs.get(slot.name)
        message = cause_of_death(log) or first_line(message)
        for server in self.farm.servers.ready():
            server.actor.rest.remote(slot.name)
        self.farm.workers.lost(slot, message)
        fault = Fault(kind=kind, message=message, traceback=tail(log), policy_at_fault=False)
        self._fault(slot.name, fault, died=True)
        if slot.given_up:
            self.farm.say(f"{slot.given_up}: given up; its log is {log}")

    def _fault(self, worker: str, fault: Fault, *, died: bool) -> None:
        """An infrastructure error: written down, and the trial goes back to pending."""
        running = self.running.pop(worker)
        trial = running.order.trial
        self.quota.end(trial, running.order.film, None)
        self.ledger.record_error(
            self.job.protocol,
            trial,
            kind=fault.kind,
            message=fault.message,
            traceback=fault.traceback,
            worker=running.server if fault.policy_at_fault else worker,
        )
        self.ledger.release(self.job.protocol, trial)
        if fault.policy_at_fault:
            self._suspect(running.server, fault)
        again = self.scheduler.failed(worker, died=died)
        where = f"{trial.suite} task {trial.task}, init state {trial.init_state}"
        what = "tried again" if again else "given up"
        self.farm.say(f"{worker}: {where}: {fault.kind}: {first_line(fault.message)}; {what}")

    def _suspect(self, server: str, fault: Fault) -> None:
        """A worker got no action. A server that raised is not trusted again: a CUDA error, say, stays for good."""
        for slot in self.farm.servers.ready():
            if slot.name == server and fault.kind == POLICY_RAISED:
                self._server_died(slot, first_line(fault.message))
            elif slot.name == server:
                self.health[server] = ServerHealth(stats=self._health_of(slot).stats, suspect=True)

    def _take_back_from_others(self) -> None:
        """Trials of another driver: those it has finished are forgotten, the rest are asked for again."""
        if self.claimed_elsewhere:
            time.sleep(POLL_S)
            done = {row.trial for row in self.ledger.outcomes()}
            self.scheduler.add(t for t in self.claimed_elsewhere if t not in done)
            self.claimed_elsewhere = []

    def _keep_video(self, trial: Trial, status: Status, video: bytes) -> str:
        """Writes a video beside the ledger; returns its path from there, or "" where the disk takes no more."""
        instruction = self.job.instructions[trial.suite, trial.task]
        name = video_name(episode=trial.init_state + 1, success=status == Status.SUCCESS, instruction=instruction)
        path = Path(VIDEOS) / safe_name(trial.policy[:12], what="policy") / trial.suite / name
        whole = self.ledger.path.parent / path
        try:
            whole.parent.mkdir(parents=True, exist_ok=True)
            whole.write_bytes(video)
        except OSError as e:
            self._say_no_video(trial, str(e))
            with suppress(OSError):
                whole.unlink()
            return ""
        return str(path)

    def _say_no_video(self, trial: Trial, why: str) -> None:
        self.farm.say(f"no video of {trial.suite} task {trial.task}, init state {trial.init_state}: {first_line(why)}")

    def _watch(self) -> None:
        """Asks the policy servers whom they heard lately; ends whoever hangs. Keeps the ledger's claims."""
        now = time.monotonic()
        if now - self.heartbeat_at_s > HEARTBEAT_EVERY_S:
            self.heartbeat_at_s = now
            self.ledger.heartbeat()
        if now - self.watched_at_s < WATCH_EVERY_S and not any(w.suspect for w in self.health.values()):
            return
        self.watched_at_s = now
        for slot in self.farm.servers.ready():
            if why := self._fault_of_server(slot, now):
                self._server_died(slot, why)
        for name, running in list(self.running.items()):
            if (quiet_s := now - running.quiet_since_s) > self.farm.config.call_timeout_s:
                self.reports = {r: n for r, n in self.reports.items() if n != name}
                self._worker_died(self._worker(name), kind="hang", message=f"no request for {quiet_s:.0f} s")

    def _fault_of_server(self, slot: ActorSlot[Any], now: float) -> str:
        """Takes the server's last answer and asks anew. Returns what is wrong with it, if anything."""
        watch, limit_s = self._health_of(slot), self.farm.config.call_timeout_s
        if watch.asked is not None and ray.wait([watch.asked], timeout=0)[0]:
            reference, watch.asked = watch.asked, None
            try:
                watch.stats = ray.get(reference)
            except ray.exceptions.RayError as e:
                return first_line(str(e))
            watch.suspect = False
            self._note_requests(slot.name, watch.stats, now)
        if watch.asked is None:
            watch.asked, watch.asked_at_s = slot.actor.stats.remote(), now
        if (silent_s := now - watch.asked_at_s) > limit_s:
            return f"no answer for {silent_s:.0f} s"
        if watch.stats.oldest_wait_s > limit_s:
            return f"a batch has taken {watch.stats.oldest_wait_s:.0f} s"
        return ""

    def _health_of(self, slot: ActorSlot[Any]) -> ServerHealth:
        return self.health.setdefault(slot.name, ServerHealth())

    def _note_requests(self, server: str, stats: BatchStats, now: float) -> None:
        for name, quiet_s in stats.quiet_s.items():
            if name in self.running and self.running[name].server == server:
                running = self.running[name]
                running.quiet_since_s = max(running.quiet_since_s, now - quiet_s)

    def _server_died(self, slot: ActorSlot[Any], why: str) -> None:
        """Its workers notice by themselves, and report their trials back."""
        self.farm.say(f"{slot.name} failed ({why}): started again")
        self.past = total([self.past, self.health.pop(slot.name, ServerHealth()).stats])
        self.farm.servers.lost(slot, why)

    def _release_all(self) -> None:
        """On the way out, interrupted or not: workers still at a trial are ended, their claims given back."""
        for name, running in list(self.running.items()):
            self.farm.workers.retire(self._worker(name))
            self.ledger.release(self.job.protocol, running.order.trial)
        self.running.clear()

    def _worker(self, name: str) -> ActorSlot[Any]:
        return next(s for s in self.farm.workers.slots if s.name == name)


def total(every: Sequence[BatchStats]) -> BatchStats:
    return BatchStats(
        batches=sum(s.batches for s in every),
        requests=sum(s.requests for s in every),
        actions=sum(s.actions for s in every),
        busy_s=sum(s.busy_s for s in every),
    )


def film_quota(ledger: Ledger, *, successes: int, failures: int) -> FilmQuota:
    quota = FilmQuota(successes=successes, failures=failures)
    for row in ledger.outcomes():
        if row.video and row.status is not None:
            quota.count(row.trial, Status(row.status))
    return quota
