"""The farm: pools of environment workers and policy servers on the cluster, kept alive, all of one protocol.

Start it once, then play as many jobs on it as you like (spvla.eval.driver).
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from spvla.cluster.machines import cpus_for, grows, request_for, total, unbounded
from spvla.config import FarmConfig
from spvla.errors import InfrastructureError
from spvla.eval.actors import RemoteEnvWorker, RemotePolicyServer
from spvla.eval.messages import ELSEWHERE, PolicyVersion, ServerFacts, ServerSettings, WorkerFacts, WorkerSettings
from spvla.eval.pool import ActorPool, ActorSlot
from spvla.eval.sizing import DECODER_CPUS, Sizes, sizes

RESIZE_EVERY_S = 5.0
SERVER_START_S = 900.0  # 15 GB from a slow disk
WORKER_START_S = 300.0
MACHINE_WAIT_S = 900.0  # a machine that must boot and set itself up first
SAY_AFTER_S = 20.0


class Farm:
    """`with Farm(config, ...) as farm:` inside a Ray connection."""

    def __init__(
        self, config: FarmConfig, *, working: WorkerSettings, serving: ServerSettings, say: Callable[[str], None]
    ) -> None:
        self.config, self.working, self.serving, self.say = config, working, serving, say
        self.versions: list[PolicyVersion] = []
        self.adapters: dict[str, list[ray.ObjectRef]] = {}
        self.workers = ActorPool[WorkerFacts]("env", self._ask_for_worker, self._start_worker, WORKER_START_S)
        self.servers = ActorPool[ServerFacts]("policy", self._ask_for_server, self._start_server, SERVER_START_S)
        self.trials_left = sys.maxsize  # no more actors are asked for than trials can be played at once
        self.said_waiting: dict[str, int] = {}  # pool -> how many wait for a machine
        self.expected: tuple[WorkerFacts, ServerFacts] | None = None
        self.logs: dict[str, Path] = {}
        self.sizes = cluster_sizes(config, serving.device)
        self.resized_at_s = 0.0

    def __enter__(self) -> "Farm":
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.close()
        self.servers.close()

    def start(self, versions: Sequence[PolicyVersion]) -> tuple[WorkerFacts, ServerFacts]:
        """Brings the policies in; returns what the first worker and the first server say of themselves."""
        self.use(versions)
        while self.expected is None:
            self.maintain()
            workers, servers = self.workers.ready(), self.servers.ready()
            if workers and servers:
                self.expected = workers[0].facts, servers[0].facts
            time.sleep(0.05)
        return self.expected

    def use(self, versions: Sequence[PolicyVersion]) -> None:
        """The policies that every server holds from now on. Adapters are moved as their few files only."""
        self.versions = list(versions)
        if grows() or sum(node["Alive"] for node in ray.nodes()) > 1:
            self.adapters = {v.digest: [ray.put(files_of(Path(v.path)))] for v in versions if v.is_adapter}
        for slot in [s for s in self.servers.slots if s.ready or s.starting is not None]:
            slot.facts, slot.starting = None, self._start_server(slot.actor)
            slot.since_s = time.monotonic()

    def maintain(self) -> None:
        """Fills empty slots, admits actors that have started, and grows with the cluster. Raises when none is left."""
        now = time.monotonic()
        if now - self.resized_at_s > RESIZE_EVERY_S:
            self.resized_at_s, self.sizes = now, cluster_sizes(self.config, self.serving.device)
            self.workers.grow_to(self.sizes.envs)
            self.servers.grow_to(self.sizes.decoders)
            self._say_who_waits()
        for pool, size in ((self.servers, self.sizes.decoders), (self.workers, self.sizes.envs)):
            pool.fill(min(size, self.trials_left))
            for slot, why in pool.started():
                if why:
                    self.say(f"{slot.name} died while starting: {why}")
                else:
                    self._admit(pool, slot)
            if not pool.alive():
                raise InfrastructureError(
                    f"no {pool.kind} actor is left ({pool.last_death}); logs: {self.working.log_folder}"
                )
            if pool.without_a_place(MACHINE_WAIT_S):
                raise InfrastructureError(
                    f"no machine took in any {pool.kind} actor within {MACHINE_WAIT_S:.0f} s; `ray status` shows who"
                    " holds what, and which machines could not be started"
                )

    def _say_who_waits(self) -> None:
        waiting = {pool.kind: len(pool.waiting(SAY_AFTER_S)) for pool in (self.workers, self.servers)}
        if any(waiting.values()) and waiting != self.said_waiting:
            self.say(
                f"waiting for room on the cluster: {waiting['env']} environments, {waiting['policy']} policy actors"
            )
        self.said_waiting = waiting

    def _admit(self, pool: ActorPool[Any], slot: ActorSlot[Any]) -> None:
        """Only an actor that would give the same results may join."""
        if pool is self.workers:
            self.logs[slot.name] = Path(slot.facts.log)
        if self.expected is None:
            return
        wanted = self.expected[0 if pool is self.workers else 1]
        if changed := wanted.differences(slot.facts):
            why = f"{slot.name} runs another protocol ({'; '.join(changed)})"
            self.say(f"{why}: left out")
            pool.dismiss(slot, why)

    def _ask_for_worker(self, name: str) -> Any:
        options = {"num_cpus": self.sizes.env_cpus, "num_gpus": 0, "resources": request_for("spvla_env")}
        return RemoteEnvWorker.options(**options).remote(name, self.working)

    def _start_worker(self, actor: Any) -> ray.ObjectRef:
        return actor.facts.remote()

    def _ask_for_server(self, name: str) -> Any:
        num_gpus = 1 if self.serving.device == "cuda" else 0
        options = {"num_cpus": DECODER_CPUS, "num_gpus": num_gpus, "resources": request_for("spvla_policy")}
        return RemotePolicyServer.options(**options).remote(name, self.serving)

    def _start_server(self, actor: Any) -> ray.ObjectRef:
        return actor.prepare.remote(self.versions, self.adapters)


def cluster_sizes(config: FarmConfig, device: str | None = None) -> Sizes:
    """What the connected cluster should carry now; `device` is kept once it is chosen."""
    return sizes(
        cpus=math.inf if unbounded() else cpus_for("spvla_env"),
        gpus=0 if device in ("cpu", ELSEWHERE) else total("GPU"),
        num_envs=config.num_envs,
        num_decoders=config.num_decoders,
        on_demand=grows(),
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """What an adapter needs on another machine: not the training state."""
    files = (f for f in folder.iterdir() if f.is_file() and not f.name.startswith("training_state"))
    return {f.name: f.read_bytes() for f in files}
