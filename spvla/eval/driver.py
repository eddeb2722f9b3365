"""One job on the farm: hands out trials, watches everything, writes what comes of it.

The driver is in no step's way: it hands out whole trials and takes whole outcomes. Other drivers may work on the same
ledger: a trial is claimed there before a worker gets it.

It goes round in ticks. A tick costs a few passes over the workers, and a constant for each trial that begins or ends in
it, however many trials the ledger holds; all of one tick's claims are one transaction, and so are its outcomes.
"""

import gc
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from pathlib import Path
from typing import Any

from spvla.eval.answers import Answer, Answers
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

TICK_S = 0.05  # a tick begins no sooner after the last one: what ends in between is booked together
MOST_AT_ONCE = 64  # trials begun, and trials ended, in one tick
WATCH_EVERY_S = 1.0
HEARTBEAT_EVERY_S = 5.0
TELL_EACH = 20  # a job of so few trials says how each ended, and where its film is


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
    slot: ActorSlot[Any]
    server: ActorSlot[Any]
    quiet_since_s: float  # the worker owes a request since: it resets, or executes what it was given


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A trial that has come back, ready to be written down."""

    running: RunningTrial
    report: TrialReport
    video: str = ""  # path beside the ledger
    died: bool = False  # the worker, too


@dataclass
class ServerHealth:
    """What is known of a policy server from its last answer."""

    stats: BatchStats = field(default_factory=BatchStats)
    asked: Any = None  # reference to the answer that it owes
    asked_at_s: float = 0.0
    suspect: bool = False  # a worker could not reach it: no trial until it has answered


class Driver:
    """`Driver(farm, job, ledger).play()`: returns when each trial has an outcome or was given up."""

    def __init__(self, farm: Farm, job: EvaluationJob, ledger: Ledger, *, answers: Answers | None = None) -> None:
        self.farm, self.job, self.ledger = farm, job, ledger
        self.answers = answers or Answers()
        self.scheduler = Scheduler(steps_limit=job.steps_limit, max_retries=farm.config.max_retries)
        self.scheduler.add(job.trials)
        self.quota = film_quota(ledger, successes=farm.config.num_videos, failures=farm.config.max_failure_videos)
        self.running: dict[str, RunningTrial] = {}  # worker -> its trial
        self.load: Counter[str] = Counter()  # policy server -> trials that it plays
        self.claimed_elsewhere: list[Trial] = []  # claimed by another driver
        self.health: dict[str, ServerHealth] = {}  # policy server -> what is known of it
        self.past = BatchStats()  # of policy servers that are gone
        self.made = 0  # outcomes written by this run
        self.more_to_come = False  # the last tick took as many answers as it may
        self.ticked_at_s = self.heartbeat_at_s = self.watched_at_s = 0.0

    def play(self, on_tick: Callable[["Driver"], None] = lambda driver: None) -> None:
        """Raises InfrastructureError when nobody is left, LedgerError when it cannot write.

        `on_tick` is called several times a second, and may drop trials from the scheduler.
        """
        gc.freeze()  # what is alive stays so: looking through it all for garbage halts a tick for 200 ms
        try:
            while not self.scheduler.finished or self.claimed_elsewhere:
                self._pace()
                self.farm.trials_left = self.scheduler.unfinished + len(self.claimed_elsewhere)
                self.farm.maintain()
                self._dispatch()
                self._collect()
                self._watch()
                if self.scheduler.finished:
                    self._take_back_from_others()
                on_tick(self)
        finally:
            gc.unfreeze()
            self._release_all()

    def drop(self, trials: Sequence[Trial]) -> int:
        """Leaves out those that nobody has begun; returns how many."""
        gone = set(trials)
        self.claimed_elsewhere = [t for t in self.claimed_elsewhere if t not in gone]
        return self.scheduler.drop(trials)

    def batch_stats(self) -> BatchStats:
        """Over all policy servers, since they started."""
        return total([self.past, *(w.stats for w in self.health.values())])

    def _pace(self) -> None:
        now = time.monotonic()
        if self.more_to_come:  # what waits already is booked at once
            self.ticked_at_s = now
            return
        if (early_s := self.ticked_at_s + TICK_S - now) > 0:
            time.sleep(early_s)
        self.ticked_at_s = max(now, self.ticked_at_s + TICK_S)

    def _dispatch(self) -> None:
        """Gives idle workers a trial, each from the policy server that has fewest."""
        servers = [s for s in self.farm.servers.ready() if not self._health_of(s).suspect]
        if not servers or not self.scheduler.num_pending:
            return
        ready = self.farm.workers.ready()
        if idle := [s for s in ready if s.name not in self.running]:
            self._send(self._claims(idle, {s.name for s in ready}), servers)

    def _claims(self, idle: Sequence[ActorSlot[Any]], living: Collection[str]) -> list[tuple[ActorSlot[Any], Trial]]:
        """A trial for each of the idle, ours alone once this returns; a limited number of them."""
        claimed: list[tuple[ActorSlot[Any], Trial]] = []
        with self.ledger.together():
            for slot in idle:
                if len(claimed) == MOST_AT_ONCE or not self.scheduler.num_pending:
                    break
                if (trial := self._claimed(slot.name, living)) is not None:
                    claimed.append((slot, trial))
        return claimed

    def _send(self, claimed: Sequence[tuple[ActorSlot[Any], Trial]], servers: Sequence[ActorSlot[Any]]) -> None:
        least = [(self.load[s.name], i) for i, s in enumerate(servers)]
        heapify(least)
        for slot, trial in claimed:
            load, i = least[0]
            heapreplace(least, (load + 1, i))
            order = TrialOrder(
                trial=trial,
                needs=self.job.needs[trial.policy],
                unnorm_key=self.job.unnorm_keys[trial.policy, trial.suite],
                max_steps=self.job.steps_limit[trial.suite],
                film=self.quota.begin(trial),
            )
            self.answers.expect(slot.name, slot.actor.run.remote(order, servers[i].actor))
            self.running[slot.name] = RunningTrial(order, slot, servers[i], time.monotonic())
            self.load[servers[i].name] += 1

    def _claimed(self, worker: str, living: Collection[str]) -> Trial | None:
        """The worker's next trial, ours alone; those that another driver has are put aside."""
        while (trial := self.scheduler.next(worker, living)) is not None:
            if self.ledger.claim(self.job.protocol, trial):
                return trial
            self.claimed_elsewhere.append(self.scheduler.skip(worker))
        return None

    def _collect(self) -> None:
        """Writes down what has come back."""
        if not self.running:
            time.sleep(POLL_S / 4)
            return
        answers = self.answers.take(timeout_s=POLL_S, most=MOST_AT_ONCE)
        self.more_to_come = len(answers) == MOST_AT_ONCE
        self._book([self._ended(self.running[name], answer) for name, answer in answers])

    def _ended(self, running: RunningTrial, answer: Answer) -> Ended:
        """What has come back, with its video kept; a worker that died is buried."""
        if answer.error:
            return self._worker_died(running, kind="environment died", message=answer.error)
        report: TrialReport = answer.value
        trial, video = running.order.trial, ""
        if report.no_video:
            self._say_no_video(trial, report.no_video)
        if report.outcome is not None and report.video:
            video = self._keep_video(trial, report.outcome.status, report.video)
        return Ended(running=running, report=report, video=video)

    def _book(self, every: Sequence[Ended]) -> None:
        """In one transaction. What is at fault is looked after when that is over."""
        if not every:
            return
        with self.ledger.together():
            for ended in every:
                del self.running[ended.running.slot.name]
                self.load[ended.running.server.name] -= 1
                if ended.report.fault is not None:
                    self._fault(ended, ended.report.fault)
                elif ended.report.outcome is not None:
                    self._done(ended, ended.report.outcome)
        for ended in every:
            if (fault := ended.report.fault) is not None and fault.policy_at_fault:
                self._suspect(ended.running.server, fault)

    def _done(self, ended: Ended, outcome: Outcome) -> None:
        slot, server, order = ended.running.slot, ended.running.server, ended.running.order
        trial = self.scheduler.done(slot.name)
        if self.ledger.record(self.job.protocol, trial, outcome, video=ended.video, worker=slot.name):
            self.made += 1
        else:
            self.claimed_elsewhere.append(trial)  # our claim had lapsed: whoever took it may yet give it back
        if len(self.job.trials) <= TELL_EACH:
            where = f"{trial.suite} task {trial.task}, init state {trial.init_state}"
            film = f"  {self.ledger.path.parent / ended.video}" if ended.video else ""
            self.farm.say(f"{where}: {outcome.status} after {outcome.steps} steps{film}")
        self.quota.end(trial, order.film, outcome.status if ended.video else None)
        slot.deaths = server.deaths = 0
        if ended.report.rss_bytes > self.farm.config.worker_memory_gb * 2**30:
            self.farm.say(f"{slot.name} holds {ended.report.rss_bytes / 2**30:.1f} GiB: replaced")
            self.farm.workers.retire(slot)
            self.scheduler.leave(slot.name)

    def _worker_died(self, running: RunningTrial, *, kind: str, message: str) -> Ended:
        """A worker died, or hangs and is ended."""
        slot = running.slot
        log = self.farm.logs.get(slot.name)
        message = cause_of_death(log) or first_line(message)
        for server in self.farm.servers.ready():
            server.actor.rest.remote(slot.name)
        self.farm.workers.lost(slot, message)
        if slot.given_up:
            self.farm.say(f"{slot.given_up}: given up; its log is {log}")
        fault = Fault(kind=kind, message=message, traceback=tail(log), policy_at_fault=False)
        return Ended(running=running, report=TrialReport(fault=fault), died=True)

    def _fault(self, ended: Ended, fault: Fault) -> None:
        """An infrastructure error: written down, and the trial goes back to pending."""
        worker, order = ended.running.slot.name, ended.running.order
        trial = order.trial
        self.quota.end(trial, order.film, None)
        self.ledger.record_error(
            self.job.protocol,
            trial,
            kind=fault.kind,
            message=fault.message,
            traceback=fault.traceback,
            worker=ended.running.server.name if fault.policy_at_fault else worker,
        )
        self.ledger.release(self.job.protocol, trial)
        again = self.scheduler.failed(worker, died=ended.died)
        where = f"{trial.suite} task {trial.task}, init state {trial.init_state}"
        what = "tried again" if again else "given up"
        self.farm.say(f"{worker}: {where}: {fault.kind}: {first_line(fault.message)}; {what}")

    def _suspect(self, server: ActorSlot[Any], fault: Fault) -> None:
        """A worker got no action. A server that raised is not trusted again: a CUDA error, say, stays for good."""
        if not server.ready:
            return
        if fault.kind == POLICY_RAISED:
            self._server_died(server, first_line(fault.message))
        else:
            self.health[server.name] = ServerHealth(stats=self._health_of(server).stats, suspect=True)

    def _take_back_from_others(self) -> None:
        """Trials of another driver: those it has finished are forgotten, the rest are asked for again."""
        if self.claimed_elsewhere:
            time.sleep(POLL_S)
            asked, self.claimed_elsewhere = self.claimed_elsewhere, []
            self.scheduler.add(self.ledger.missing(self.job.protocol, asked))

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
        hanging = [r for r in self.running.values() if now - r.quiet_since_s > self.farm.config.call_timeout_s]
        self._book([self._end_hanging(running, now) for running in hanging])

    def _end_hanging(self, running: RunningTrial, now: float) -> Ended:
        self.answers.forget(running.slot.name)
        return self._worker_died(running, kind="hang", message=f"no request for {now - running.quiet_since_s:.0f} s")

    def _fault_of_server(self, slot: ActorSlot[Any], now: float) -> str:
        """Takes the server's last answer and asks anew. Returns what is wrong with it, if anything."""
        watch, limit_s = self._health_of(slot), self.farm.config.call_timeout_s
        if watch.asked is not None and (answer := self.answers.poll(watch.asked)) is not None:
            watch.asked = None
            if answer.error:
                return first_line(answer.error)
            watch.stats, watch.suspect = answer.value, False
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
            running = self.running.get(name)
            if running is not None and running.server.name == server:
                running.quiet_since_s = max(running.quiet_since_s, now - quiet_s)

    def _server_died(self, slot: ActorSlot[Any], why: str) -> None:
        """Its workers notice by themselves, and report their trials back."""
        self.farm.say(f"{slot.name} failed ({why}): started again")
        self.past = total([self.past, self.health.pop(slot.name, ServerHealth()).stats])
        self.farm.servers.lost(slot, why)

    def _release_all(self) -> None:
        """On the way out, interrupted or not: workers still at a trial are ended, their claims given back."""
        for running in self.running.values():
            self.farm.workers.retire(running.slot)
        with self.ledger.together():
            for running in self.running.values():
                self.ledger.release(self.job.protocol, running.order.trial)
        self.running.clear()


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
