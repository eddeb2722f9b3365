"""What runs on the cluster: environment workers, and policy servers that batch their requests.

A worker plays whole trials and asks a server for its actions, so the driver is in no step's way. Both
are plain classes; `ray.remote` comes last. Neither is ever restarted by Ray: the driver sees a death, keeps the books,
and starts another.
"""

import asyncio
import faulthandler
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from spvla.errors import InfrastructureError
from spvla.eval.batcher import Batcher, BatchStats
from spvla.eval.episode import Act, draw_film, run_trial
from spvla.eval.messages import (
    ELSEWHERE,
    EXCEPTION,
    POLICY_GONE,
    POLICY_RAISED,
    ActionRequest,
    Fault,
    PolicyVersion,
    ServerFacts,
    ServerSettings,
    TrialOrder,
    TrialReport,
    WorkerFacts,
    WorkerSettings,
)
from spvla.eval.pool import LOG_HEADER
from spvla.eval.videos import encode_mp4
from spvla.policies.registry import EXTERNAL, AdaptablePolicy, external, family
from spvla.types import ENV_NUMBER, Env, Observation, Trial


def open_base(version: PolicyVersion, settings: ServerSettings) -> AdaptablePolicy:
    """A version's base, without its adapter."""
    if version.description.family in EXTERNAL:
        return external(version.description.family).open(version.description, number=settings.number)
    return family(version.description.family).open(
        Path(version.base),
        version.description,
        name=version.base,
        device=settings.device,
        dtype=settings.dtype,
        load_in_8bit=settings.load_in_8bit,
        load_in_4bit=settings.load_in_4bit,
        decode_batch_size=settings.decode_batch_size,
    )


class PolicyUnavailable(InfrastructureError):
    """The policy actor died, does not answer, or raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"no action from the policy actor: {type(cause).__name__}: {cause}")
        self.kind = POLICY_RAISED if isinstance(cause, ray.exceptions.RayTaskError) else POLICY_GONE


class PolicyServer:
    """Loaded policies and their batcher: an async class whose decoding runs on threads of its own.

    With a GPU they are two: one batch is decoded while the next is made ready behind it. What only passes requests on
    to a server elsewhere has one for each that may be under way.
    """

    def __init__(self, name: str, settings: ServerSettings) -> None:
        log_to(settings.log_folder, name)
        self.settings = replace(settings, number=int(name.rpartition("-")[2]))
        self.policies: dict[tuple[str, str], AdaptablePolicy] = {}  # `opened_as` of the versions that stand on it
        self.actions = 0  # given out to be executed
        self.versions: dict[str, PolicyVersion] = {}
        self.changing = asyncio.Lock()
        self.depth = settings.under_way
        self.decoding = ThreadPoolExecutor(self.depth, "decode", initializer=self._prepare_thread)
        self.batcher: Batcher[ActionRequest, np.ndarray] = Batcher(
            self._decode,
            size=settings.max_batch,
            wait_ms=settings.wait_ms,
            fixed_cost=settings.decode_batch_size > 0,
            depth=self.depth,
        )

    def _prepare_thread(self) -> None:
        if self.settings.device == "cpu":
            import torch

            torch.set_num_threads(1)  # a sum's order, and so its last bit, follows the number of threads

    async def prepare(self, versions: Sequence[PolicyVersion], adapters: dict[str, list[ray.ObjectRef]]) -> ServerFacts:
        """Makes these versions resident, and no others. `adapters` holds, by digest, the files of one whose folder is
        elsewhere. Calls wait for one another: two at once would load a base twice, or drop what the other needs."""
        async with self.changing:
            return await asyncio.get_running_loop().run_in_executor(self.decoding, self._prepare, versions, adapters)

    def _prepare(self, versions: Sequence[PolicyVersion], adapters: dict[str, list[ray.ObjectRef]]) -> ServerFacts:
        for version in versions:
            if version.digest not in self.versions:
                here = not version.is_adapter or Path(version.path).is_dir()
                self.add(version, None if here else ray.get(adapters[version.digest][0]))
        for digest in self.versions.keys() - {v.digest for v in versions}:  # after: a base that both need stays
            self.remove(digest)
        for policy in self.policies.values():
            policy.prepare(list(self.settings.instructions))
        return ServerFacts(device=self._arithmetic(), pid=os.getpid())

    def _arithmetic(self) -> str:
        if self.settings.device == ELSEWHERE:
            return ELSEWHERE
        from spvla.model.kernels.compiled import arithmetic

        return arithmetic(self.settings.device, self.settings.dtype)

    def add(self, version: PolicyVersion, files: dict[str, bytes] | None = None) -> None:
        """Loads a base checkpoint, or an adapter beside its base: from its folder, or from `files`."""
        if version.opened_as not in self.policies:
            policy = self.settings.load(version, self.settings)
            assert policy.needs == version.needs, f"{version.base}: {policy.needs}, described as {version.needs}"
            self.policies[version.opened_as] = policy
        if version.is_adapter:
            with unpacked(files, otherwise=Path(version.path)) as folder:
                self.policies[version.opened_as].add_adapter(version.digest, folder)
        self.versions[version.digest] = version

    def remove(self, digest: str) -> None:
        """Forgets a version, and its base when no other version needs it."""
        version = self.versions.pop(digest)
        if version.is_adapter:
            self.policies[version.opened_as].remove_adapter(digest)
        if not any(v.opened_as == version.opened_as for v in self.versions.values()):
            del self.policies[version.opened_as]

    async def act(self, client: str, request: ActionRequest) -> np.ndarray:
        """(K, 7) float64: un-normalised, gripper 1 open."""
        return await self.batcher.submit(request, client=client)

    async def rest(self, client: str) -> None:
        self.batcher.rest(client)

    async def stats(self) -> BatchStats:
        return replace(self.batcher.stats(), actions=self.actions)

    async def _decode(self, requests: list[ActionRequest]) -> Sequence[np.ndarray]:
        answers = await asyncio.get_running_loop().run_in_executor(self.decoding, self.act_now, requests)
        self.actions += sum(self.versions[r.version].needs.execute for r in requests)
        return answers

    def act_now(self, requests: list[ActionRequest]) -> list[np.ndarray]:
        """One pass for each base among the requests; adapters of one base share a pass."""
        answers: list[np.ndarray] = [np.empty(0)] * len(requests)
        by_base: dict[tuple[str, str], list[int]] = {}
        for i, request in enumerate(requests):
            by_base.setdefault(self.versions[request.version].opened_as, []).append(i)
        for base, rows in by_base.items():
            group = [requests[i] for i in rows]
            chunks = self.policies[base].act(
                [r.observation for r in group],
                unnorm_key=[r.unnorm_key for r in group],
                adapters=[r.version if self.versions[r.version].is_adapter else None for r in group],
            )
            for i, chunk in zip(rows, chunks, strict=True):
                answers[i] = chunk
        return answers


class EnvWorker:
    """Plays trials one at a time, keeping the environment of its last task open."""

    def __init__(self, name: str, settings: WorkerSettings) -> None:
        self.name, self.settings = name, settings
        self.log = log_to(settings.log_folder, name)
        if (number := name.rpartition("-")[2]).isdigit():
            os.environ[ENV_NUMBER] = number  # env-5 of a machine with two GPUs draws on the second
        self.benchmark = settings.benchmark
        self.task: tuple[str, int] | None = None
        self.env: Env | None = None

    def facts(self) -> WorkerFacts:
        world = self.benchmark.facts() | self.benchmark.measure()
        return WorkerFacts(world=world, pid=os.getpid(), log=str(self.log or ""))

    def run(self, order: TrialOrder, server: Any) -> TrialReport:
        """Plays one trial with actions from `server` (a PolicyServer's handle). Never raises."""
        act = self._remote_act(order, server)
        try:
            return self.play(order, act)
        except PolicyUnavailable as e:
            return TrialReport(fault=fault_of(e, e.kind, policy_at_fault=True))
        except Exception as e:
            self._drop_env()
            return TrialReport(fault=fault_of(e, EXCEPTION, policy_at_fault=False))
        finally:
            server.rest.remote(self.name)

    def play(self, order: TrialOrder, act: Act) -> TrialReport:
        """Plays one trial with any `act`. Raises InfrastructureError."""
        trial = order.trial
        moments: list[object] = []
        env = self._env_of(trial)
        outcome = run_trial(
            env,
            act,
            trial,
            needs=order.needs,
            num_steps_wait=self.settings.num_steps_wait,
            center_crop=self.settings.center_crop,
            max_steps=order.max_steps,
            moments=moments if order.film else None,
        )
        video, no_video = None, ""
        if outcome.status in order.film and moments:
            try:
                video = encode_mp4(draw_film(env, moments))
            except Exception as e:  # no encoder on this machine, say: the outcome stands
                no_video = f"{type(e).__name__}: {e}"
        return TrialReport(outcome=outcome, video=video, no_video=no_video, rss_bytes=resident_bytes())

    def _remote_act(self, order: TrialOrder, server: Any) -> Act:
        def act(observation: Observation) -> np.ndarray:
            request = ActionRequest(version=order.trial.policy, observation=observation, unnorm_key=order.unnorm_key)
            try:
                return ray.get(server.act.remote(self.name, request), timeout=self.settings.call_timeout_s)
            except (ray.exceptions.RayError, TimeoutError) as e:
                raise PolicyUnavailable(e) from e

        return act

    def _env_of(self, trial: Trial) -> Env:
        if self.task != (trial.suite, trial.task):
            self._drop_env()
            self.env = self.benchmark.open_env(trial.suite, trial.task, spare_gpu=self.settings.spare_gpu)
            self.task = (trial.suite, trial.task)
        return self.env

    def _drop_env(self) -> None:
        env, self.env, self.task = self.env, None, None
        if env is not None:
            env.close()


@contextmanager
def unpacked(files: dict[str, bytes] | None, *, otherwise: Path) -> Iterator[Path]:
    """A folder with `files` in it that vanishes afterwards, or the folder `otherwise`."""
    if files is None:
        yield otherwise
        return
    with tempfile.TemporaryDirectory(prefix="spvla-adapter-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def fault_of(e: Exception, kind: str, *, policy_at_fault: bool) -> Fault:
    return Fault(
        kind=kind, message=str(e), traceback="".join(traceback.format_exception(e)), policy_at_fault=policy_at_fault
    )


def resident_bytes() -> int:
    """Memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def log_to(folder: str | None, name: str) -> Path | None:
    """Sends this process's stdout and stderr, crashes in native code included, to `folder`/`name`.log.

    None leaves them alone: for use in the caller's own process.
    """
    if folder is None:
        return None
    path = Path(folder) / f"{name}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", buffering=1)
    except OSError:  # another machine, which does not see the driver's disk
        path = Path(tempfile.gettempdir()) / f"spvla-{name}.log"
        log = path.open("a", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())
    print(f"{LOG_HEADER} {os.getpid()}, {name}, {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
    faulthandler.enable(log)
    return path


RemotePolicyServer = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=1000)(PolicyServer)
RemoteEnvWorker = ray.remote(max_restarts=0, max_task_retries=0)(EnvWorker)
