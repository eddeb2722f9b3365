"""Samples a second of the self-play step on 1, 2, 4 GPUs of one machine, through Ray Train and NCCL, in one run.

    python bench/ddp.py --workers 1,2                                  # OpenVLA 7B at random weights
    python bench/ddp.py --workers 1,2 --preset tiny --device cpu --batch 2 --steps 3     # smoke test, by gloo

Every worker makes the base model on its own device and an adapter of its own; the learner must make the adapters equal
at the start, and they must still be equal, bit for bit, at the end. The base is one because its seed is one.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from train_step import BETA, LEARNING_RATE, random_batch, random_core, random_lora

from spvla.cluster.connect import connection
from spvla.cluster.machines import require_resources
from spvla.config import StepConfig
from spvla.model.lora_file import LoraFile
from spvla.train.reference import together
from spvla.train.step import Learner

WARM_UP = 1  # groups of steps
Row = dict[str, float]


def main() -> None:
    args = arguments()
    worlds = [int(w) for w in args.workers.split(",")]
    rows: dict[int, list[Row]] = {world: [] for world in worlds}
    with connection(num_cpus=max(worlds) * args.cpus_per_worker):
        on_gpu = args.device == "cuda"
        require_resources("the largest run", **({"GPU": max(worlds)} if on_gpu else {"CPU": max(worlds)}))
        for _ in range(args.rounds):
            for world in worlds:
                rows[world].append(fit(args, world))
                print(f"{world} workers  {json.dumps(rows[world][-1])}", file=sys.stderr, flush=True)
    print(table(rows))
    if args.out:
        name = torch.cuda.get_device_name() if on_gpu else "cpu"
        args.out.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, in the order they run")
    parser.add_argument("--rounds", type=int, default=1, help="times the whole list runs")
    parser.add_argument("--preset", default="7b", choices=("7b", "tiny"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=20, help="samples a worker")
    parser.add_argument("--text", type=int, default=38, help="text tokens of a sample")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12, help="timed, after as many as are asked at once to warm up")
    parser.add_argument("--cpus_per_worker", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--out", type=Path, help="JSON")
    return parser.parse_args()


def fit(args: argparse.Namespace, world: int) -> Row:
    """One Ray Train run; rank 0's numbers."""
    on_gpu = args.device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        return (
            TorchTrainer(
                work,
                train_loop_config={"args": args},
                torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout_s=600),
                scaling_config=ScalingConfig(
                    num_workers=world, use_gpu=on_gpu, resources_per_worker={"CPU": args.cpus_per_worker, "GPU": on_gpu}
                ),
                run_config=RunConfig(
                    name="ddp",
                    storage_path=folder,
                    failure_config=FailureConfig(max_failures=0, controller_failure_limit=1),
                ),
            )
            .fit()
            .return_value
        )


def work(config: dict[str, argparse.Namespace]) -> Row:
    """What every worker runs; rank 0's answer counts."""
    args = config["args"]
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # NVLink multicast stays off
    device = ray.train.torch.get_device()
    torch.set_num_threads(args.cpus_per_worker)
    rank, world = dist.get_rank(), dist.get_world_size()
    model = random_core(args)
    adapter = scattered(random_lora(model, args.rank), rank)
    compiled = device.type == "cuda" and not args.eager
    learner = Learner(model, StepConfig(beta=BETA, learning_rate=LEARNING_RATE, compile=compiled), policy=adapter)
    equal_at_start = equal(learner)
    batches = cycle([random_batch(args.batch, args.text, seed) for seed in (2 * rank, 2 * rank + 1)])
    ahead = min(args.steps, together(args.batch))  # steps that the opponent answers at once
    seconds, parts = [], []
    for _ in range(WARM_UP + args.steps // ahead):
        dist.barrier()
        start = time.perf_counter()
        coming = learner.prepare([[batch] for batch in islice(batches, ahead)])
        parts.append([pending.read() for pending in [learner.step(batches) for batches in coming]])
        seconds.append((time.perf_counter() - start) / ahead)
        assert not any(metrics["skipped"] for metrics in parts[-1]), parts[-1]
    seconds, parts = seconds[WARM_UP:], [metrics for group in parts[WARM_UP:] for metrics in group]
    step_s = statistics.median(seconds)
    return {
        "workers": world,
        "samples_per_s": world * args.batch / step_s,
        "step_s": step_s,
        "spread_s": max(seconds) - min(seconds),
        "reduce_s": reduce_s(learner),
        **{part: statistics.median(p[part] for p in parts) for part in ("opponent_s", "forward_s", "backward_s")},
        "memory_gib": parts[-1]["memory_gib"],
        "equal_at_start": equal_at_start,
        "equal_at_end": equal(learner),
        "trained_numbers": learner.policy.master.numel(),
    }


def scattered(adapter: LoraFile, rank: int) -> LoraFile:
    """Each worker's another one, so that equality afterwards is the learner's doing."""
    by = 1 + 0.1 * rank
    return replace(adapter, factors={name: (by * a, by * b) for name, (a, b) in adapter.factors.items()})


def equal(learner: Learner) -> float:
    """1.0 if all workers hold the same adapter, bit for bit."""
    digest = hashlib.sha256(learner.policy.master.detach().cpu().numpy().tobytes()).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8).int()
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return float(torch.equal(low, high))


def reduce_s(learner: Learner, times: int = 10) -> float:
    """Median seconds of one sum over workers of the whole gradient."""
    gradient, seconds = torch.zeros_like(learner.policy.master), []
    for _ in range(times):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradient)
        if gradient.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def table(rows: dict[int, list[Row]]) -> str:
    """One line for each number of workers; rates are medians over rounds."""
    rate = {world: statistics.median(r["samples_per_s"] for r in found) for world, found in rows.items()}
    fewest = min(rate)
    lines = [
        f"{'workers':>7} {'samples/s':>10} {'of linear':>10} {'step s':>8} {'reduce s':>9} {'GiB':>6}  adapters equal"
    ]
    for world, found in sorted(rows.items()):
        last = found[-1]
        linear = rate[world] / (rate[fewest] * world / fewest)
        same = all(r["equal_at_start"] and r["equal_at_end"] for r in found)
        lines.append(
            f"{world:>7} {rate[world]:>10.2f} {linear:>10.1%} {last['step_s']:>8.3f} {last['reduce_s']:>9.4f} "
            f"{last['memory_gib']:>6.1f}  {'at start and end' if same else 'NO'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
