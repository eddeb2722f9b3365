"""Does the farm keep the machine busy? Environments alone, policy alone, and the farm, alternating in one run.

    OMP_NUM_THREADS=1 taskset -c 0,1 python bench/farm.py --num_envs 3 --num_cpus 2 --cores_apart   # 4 minutes
    python bench/farm.py --preset 7b --num_envs 32   # one H200: OpenVLA's size, random weights
    python bench/farm.py --preset 7b --num_envs 32 --oft_head l1   # OpenVLA-OFT's: two cameras, proprio, chunks of 8

supply  policy steps a second of the environment workers, each answering itself at once
demand  actions a second of the policy actors, every batch full
farm    actions a second of both together, once every worker has ended a trial and until trials run short

CPU milliseconds of one action are given beside each: on a machine with other work they say what rates cannot.

The farm cannot exceed the smaller of supply and demand; its share of that is the figure of merit, where the two have
hardware of their own: CPU cores and a GPU, or with --cores_apart one core for policy and Ray, the others to simulate,
in all three measurements. Where they share the cores of a machine without a GPU, each action costs CPU time of both,
and the farm cannot exceed cores / (supply_cpu_ms + demand_cpu_ms) either, which is given as "sharing_cores".

Beyond the project's own requirements nothing is needed; TensorFlow, h5py, pyarrow and W&B are not.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from spvla.benchmarks.libero.benchmark import Libero
from spvla.benchmarks.libero.suites import MAX_STEPS
from spvla.benchmarks.registry import BenchmarkFlags
from spvla.cluster.connect import connection
from spvla.config import FarmConfig
from spvla.eval.actors import EnvWorker, PolicyServer
from spvla.eval.batcher import BatchStats
from spvla.eval.driver import Driver, EvaluationJob
from spvla.eval.episode import Act
from spvla.eval.farm import Farm, cluster_sizes
from spvla.eval.ledger import Ledger
from spvla.eval.messages import ActionRequest, PolicyVersion, ServerSettings, TrialOrder, WorkerSettings
from spvla.eval.pool import ActorPool
from spvla.eval.protocol import Protocol
from spvla.eval.sizing import DECODER_CPUS, Sizes, decode_batch_size
from spvla.policies.oft.form import OftForm
from spvla.policies.registry import Description
from spvla.types import PROPRIO_DIM, Env, Observation, Trial

VERSION = PolicyVersion(digest="random", name="random weights", path="random", base="random", is_adapter=False)
STATISTICS = {
    "action": {"q01": [-0.9] * 6 + [0.0], "q99": [0.9] * 6 + [1.0], "mask": [True] * 6 + [False]}
    | {"min": [-1.0] * 7, "max": [1.0] * 7, "mean": [0.0] * 7, "std": [1.0] * 7},
    "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8, "min": [-1.0] * 8, "max": [1.0] * 8},
}


def main() -> None:
    args = arguments()
    if args.cores_apart:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # with the cluster, which it starts
    with connection(num_cpus=args.num_cpus or None):
        bench = Bench(args)
        rounds = []
        for n in range(args.rounds):
            rounds.append({k: v for part in args.measure for k, v in getattr(bench, part)().items()})
            say(f"round {n}: " + "  ".join(f"{k} {v:.2f}" for k, v in rounds[-1].items()))
    results = summary(args, bench, rounds)
    print(json.dumps(results, indent=2))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "7b"), default="tiny")
    parser.add_argument("--oft_head", choices=("discrete", "l1"), default=None, help="OpenVLA-OFT's form")
    parser.add_argument("--task_suite_name", default="libero_spatial")
    parser.add_argument("--num_envs", type=int, default=0)
    parser.add_argument("--decoders", type=int, default=0, help="policy actors; 0: one for each GPU, or one")
    parser.add_argument("--decode_batch_size", type=int, default=0)
    parser.add_argument("--wait_ms", type=float, default=None)
    parser.add_argument("--num_cpus", type=int, default=0, help="logical CPUs of the local cluster; 0: all")
    parser.add_argument("--cores_apart", action="store_true", help="one core for policy and Ray, others to simulate")
    parser.add_argument("--max_steps", type=int, default=60, help="steps a trial, so that every round sees resets")
    parser.add_argument("--trials", type=int, default=4, help="trials for each environment and round")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each measurement of supply and demand")
    parser.add_argument("--measure", default="supply,demand,farm", help="farm alone, to compare rates of farms")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    args.measure = args.measure.split(",")
    cores = os.sched_getaffinity(0)
    args.env_cores = frozenset(cores - {max(cores)}) if args.cores_apart else None
    if args.cores_apart and not args.env_cores:
        parser.error("--cores_apart on one core; expected two or more: one is for policy and Ray")
    if args.trials < 4:
        parser.error(
            f"--trials {args.trials}; expected 4 or more: measuring begins after two for each environment, and ends "
            "when none is left to start"
        )
    return args


def random_policy(version: PolicyVersion, settings: ServerSettings) -> Any:
    """A policy of a preset's size with random weights, made where it runs. The version's base is the preset's name."""
    import torch

    from spvla.model.openvla import OpenVLA
    from spvla.policies.openvla.policy import OpenVLAPolicy
    from spvla.policies.openvla.presets import preset
    from spvla.policies.openvla.prompt import build_tiny_tokenizer

    kind = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    with torch.device("meta"):
        model = OpenVLA(preset(version.base)).to(kind)
    model = model.to_empty(device=settings.device).eval().requires_grad_(False)
    generator = torch.Generator(settings.device).manual_seed(0)
    for name, parameter in model.named_parameters():
        plain = "norm" in name or name.endswith("scale_factor")
        parameter.data.fill_(1.0) if plain else parameter.data.normal_(0, 0.02, generator=generator)
    rest = {
        "tokenizer": build_tiny_tokenizer(),
        "norm_stats": {suite: STATISTICS for suite in MAX_STEPS},
        "name": version.base,
        "decode_batch_size": settings.decode_batch_size,
    }
    if version.description.form is None:
        return OpenVLAPolicy(model=model, **rest)
    from spvla.policies.oft.network import OpenVLAOFT
    from spvla.policies.oft.policy import OpenVLAOFTPolicy

    whole = OpenVLAOFT.around(model, version.description.form).eval().requires_grad_(False)
    return OpenVLAOFTPolicy(model=whole, **rest)


class LiberoApart(Libero):
    """LIBERO, the thread that simulates moved to `cores` (with --cores_apart)."""

    def __init__(self, flags: BenchmarkFlags, cores: frozenset[int] | None) -> None:
        super().__init__(flags)
        self.cores = cores

    def __reduce__(self) -> tuple:
        return LiberoApart, (self.flags, self.cores)

    def open_env(self, suite: str, task: int, *, spare_gpu: bool = False) -> Env:
        if self.cores:
            os.sched_setaffinity(0, self.cores)  # this thread; Ray's own stay where Ray is
        return super().open_env(suite, task, spare_gpu=spare_gpu)


class SupplyWorker(EnvWorker):
    """An environment worker that answers itself."""

    def supply(self, order: TrialOrder, seconds: float) -> tuple[int, float, float]:
        """(policy steps, seconds, CPU seconds) over whole trials, the first not counted: it opens the environment."""
        self.play(order, self.answer(order))
        steps, start, cpu = 0, time.monotonic(), time.process_time()
        while (now := time.monotonic()) - start < seconds:
            trial = replace(order.trial, init_state=(order.trial.init_state + 1) % 50)
            order = replace(order, trial=trial)
            steps += self.play(order, self.answer(order)).outcome.steps
        return steps, now - start, time.process_time() - cpu

    @staticmethod
    def answer(order: TrialOrder) -> Act:
        chunk = np.tile([0.1, 0, 0, 0, 0, 0, 1.0], (order.needs.chunk, 1))
        return lambda observation: chunk


class DemandServer(PolicyServer):
    """A policy server that asks itself, every batch full."""

    async def demand(self, suite: str, instruction: str, seconds: float) -> tuple[int, float, float]:
        """(actions, seconds, CPU seconds), with as many batches under way as in the farm."""
        import asyncio

        loop = asyncio.get_running_loop()
        ask = [
            loop.run_in_executor(self.decoding, self._demand, suite, instruction, seconds) for _ in range(self.depth)
        ]
        cpu = time.process_time()
        found = await asyncio.gather(*ask)
        return sum(n for n, _ in found), max(s for _, s in found), time.process_time() - cpu

    def _demand(self, suite: str, instruction: str, seconds: float) -> tuple[int, float]:
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        (version,) = self.versions.values()
        needs = version.needs
        observation = Observation(
            images=(image,) * len(needs.cameras),
            instruction=instruction,
            proprio=np.zeros(PROPRIO_DIM, np.float32) if needs.proprio else None,
        )
        request = ActionRequest(version=VERSION.digest, observation=observation, unnorm_key=suite)
        batch = [request] * self.settings.max_batch
        actions, start = 0, time.monotonic()
        while (now := time.monotonic()) - start < seconds:
            actions += needs.execute * len(self.act_now(batch))
        return actions, now - start


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.suite = args, args.task_suite_name
        self.config = FarmConfig(
            num_envs=args.num_envs, num_decoders=args.decoders, num_videos=0, max_failure_videos=0, call_timeout_s=300
        )
        self.sizes: Sizes = cluster_sizes(self.config)
        batch_size = args.decode_batch_size or decode_batch_size(self.sizes)
        self.benchmark = LiberoApart(BenchmarkFlags(), args.env_cores)
        self.instructions = self.benchmark.instructions(self.suite)
        self.working = WorkerSettings(
            benchmark=self.benchmark,
            spare_gpu=self.sizes.device == "cuda",
            num_steps_wait=10,
            center_crop=True,
            call_timeout_s=300,
            log_folder=tempfile.mkdtemp(prefix="spvla-bench-"),
        )
        self.serving = ServerSettings(
            device=self.sizes.device,
            dtype="bfloat16" if self.sizes.device == "cuda" else "float32",
            load_in_8bit=False,
            load_in_4bit=False,
            decode_batch_size=batch_size,
            instructions=tuple(i for suite in MAX_STEPS for i in self.benchmark.instructions(suite)),
            max_batch=batch_size,
            under_way=2 if self.sizes.device == "cuda" else 1,
            wait_ms=args.wait_ms,
            log_folder=self.working.log_folder,
            load=random_policy,
        )
        self.version = replace(VERSION, base=args.preset)
        if args.oft_head:
            form = OftForm(cameras=2, proprio=True, head=args.oft_head)
            self.version = replace(self.version, description=Description(family="oft", needs=form.needs(), form=form))
        say(f"{self.sizes}, batches of {batch_size}, logs in {self.working.log_folder}")

    def supply(self) -> dict[str, float]:
        remote = ray.remote(max_restarts=0)(SupplyWorker)
        workers = [
            remote.options(num_cpus=self.sizes.env_cpus).remote(f"supply-{i}", self.working)
            for i in range(self.sizes.envs)
        ]
        orders = [
            TrialOrder(
                trial=self.trial(i % len(self.instructions), i % 50),
                needs=self.version.needs,
                unnorm_key=self.suite,
                max_steps=self.args.max_steps,
                film=frozenset(),
            )
            for i in range(len(workers))
        ]
        found = ray.get([w.supply.remote(o, self.args.seconds) for w, o in zip(workers, orders, strict=True)])
        for worker in workers:
            ray.kill(worker)
        return together("supply", found)

    def demand(self) -> dict[str, float]:
        remote = ray.remote(max_restarts=0)(DemandServer)
        gpus = 1 if self.sizes.device == "cuda" else 0
        servers = [
            remote.options(num_cpus=DECODER_CPUS, num_gpus=gpus).remote(f"demand-{i}", self.serving)
            for i in range(self.sizes.decoders)
        ]
        ray.get([s.prepare.remote([self.version], {}) for s in servers])
        found = ray.get([s.demand.remote(self.suite, self.instructions[0], self.args.seconds) for s in servers])
        for server in servers:
            ray.kill(server)
        return together("demand", found)

    def farm(self) -> dict[str, float]:
        """Actions a second while every worker has a trial."""
        tasks = min(len(self.instructions), self.sizes.envs)  # as in a long run, no worker opens a task for one trial
        per_task = -(-self.args.trials * self.sizes.envs // tasks)
        trials = [self.trial(task, i) for task in range(tasks) for i in range(min(50, per_task))]
        with (
            tempfile.TemporaryDirectory() as folder,
            Ledger.create(Path(folder) / "ledger.sqlite") as ledger,
            Farm(self.config, working=self.working, serving=self.serving, say=say) as farm,
        ):
            start_s = time.monotonic()
            facts = farm.start([self.version])
            self.device, self.renderer = facts[1].device, facts[0].world["renderer"]
            protocol = self.register(ledger, trials)
            job = EvaluationJob(
                protocol=protocol,
                trials=trials,
                needs={VERSION.digest: self.version.needs},
                unnorm_keys={(VERSION.digest, self.suite): self.suite},
                instructions={(self.suite, i): text for i, text in enumerate(self.instructions)},
                steps_limit={self.suite: self.args.max_steps},
            )
            window = Window(farm)
            Driver(farm, job, ledger).play(window.look)
            steps = sum(row.steps for row in ledger.outcomes())
            return {
                "farm": window.rate,
                "farm_env_cpu_ms": window.env_cpu_ms,
                "farm_policy_cpu_ms": window.policy_cpu_ms,
                "window_s": window.seconds,
                "batch_fill": window.mean_size / self.serving.max_batch,
                "busy": window.busy,
                "whole": steps / (time.monotonic() - start_s),
                "errors": len(ledger.errors()),
            }

    def register(self, ledger: Ledger, trials: list[Trial]) -> str:
        protocol = Protocol(
            world={"benchmark": "bench/farm.py"},
            num_steps_wait=10,
            center_crop=True,
            seed=0,
            device=self.serving.device,
            dtype=self.serving.dtype,
            decode_batch_size=self.serving.decode_batch_size,
        )
        ledger.add_protocol(protocol)
        ledger.add_policy(VERSION.digest, name=VERSION.name, path=VERSION.path)
        ledger.add_trials(protocol.digest, trials)
        return protocol.digest

    def trial(self, task: int, init_state: int) -> Trial:
        return Trial(policy=VERSION.digest, suite=self.suite, task=task, init_state=init_state)


@dataclass(frozen=True)
class Reading:
    at_s: float
    stats: BatchStats
    env_cpu_s: float
    policy_cpu_s: float


class Window:
    """From when every worker has ended a trial until none is pending: readings at both ends."""

    def __init__(self, farm: Farm) -> None:
        self.farm, self.envs, self.ends = farm, farm.sizes.envs, []

    def look(self, driver: Driver) -> None:
        if len(driver.running) < self.envs or driver.made < 2 * self.envs or driver.scheduler.num_pending == 0:
            return
        stats = driver.batch_stats()
        if not self.ends or stats.requests > self.ends[-1].stats.requests:
            env_s, policy_s = cpu_seconds(self.farm.workers), cpu_seconds(self.farm.servers)
            self.ends = [*self.ends[:1], Reading(time.monotonic(), stats, env_s, policy_s)]

    @property
    def env_cpu_ms(self) -> float:
        return 1000 * (self.ends[-1].env_cpu_s - self.ends[0].env_cpu_s) / max(1, self.difference("actions"))

    @property
    def policy_cpu_ms(self) -> float:
        return 1000 * (self.ends[-1].policy_cpu_s - self.ends[0].policy_cpu_s) / max(1, self.difference("actions"))

    @property
    def seconds(self) -> float:
        return self.ends[-1].at_s - self.ends[0].at_s if len(self.ends) > 1 else 0.0

    def difference(self, name: str) -> float:
        return getattr(self.ends[-1].stats, name) - getattr(self.ends[0].stats, name) if len(self.ends) > 1 else 0.0

    @property
    def rate(self) -> float:
        return self.difference("actions") / self.seconds if self.seconds else float("nan")

    @property
    def mean_size(self) -> float:
        batches = self.difference("batches")
        return self.difference("requests") / batches if batches else 0.0

    @property
    def busy(self) -> float:
        """Share of the time that policy actors were decoding, summed over them."""
        return self.difference("busy_s") / self.seconds if self.seconds else 0.0


def together(name: str, found: list[tuple[int, float, float]]) -> dict[str, float]:
    """Rates of several actors, added; CPU of one action, averaged over all actions."""
    actions = sum(n for n, _, _ in found)
    return {name: sum(n / s for n, s, _ in found), f"{name}_cpu_ms": 1000 * sum(c for _, _, c in found) / actions}


def cpu_seconds(pool: ActorPool) -> float:
    """User and system time of a pool's processes on this machine."""
    total = 0.0
    for slot in pool.ready():
        fields = Path(f"/proc/{slot.facts.pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def summary(args: argparse.Namespace, bench: Bench, rounds: list[dict[str, float]]) -> dict[str, Any]:
    middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    longest = 500 * MAX_STEPS["libero_spatial"]
    shares: dict[str, float] = {}
    if "supply" in middle and "demand" in middle:
        shares["share_of_smaller"] = statistics.median(r["farm"] / min(r["supply"], r["demand"]) for r in rounds)
        if bench.sizes.device == "cpu" and not args.cores_apart:
            cores = len(os.sched_getaffinity(0))
            shares["sharing_cores"] = 1000 * cores / (middle["supply_cpu_ms"] + middle["demand_cpu_ms"])
            shares["share_of_sharing_cores"] = middle["farm"] / shares["sharing_cores"]
    return {
        "device": bench.device,
        "renderer": bench.renderer,
        "preset": args.preset,
        "oft_head": args.oft_head,
        "sizes": asdict(bench.sizes),
        "batch_size": bench.serving.max_batch,
        "rounds": rounds,
        "median": middle,
        **shares,
        "minutes_of_500_libero_spatial_trials_at_full_length": longest / middle["farm"] / 60,
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
