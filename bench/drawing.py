"""What pictures cost a GPU that computes: a matrix product's time while environments draw beside it, and alone.

    python bench/drawing.py --rates 100,200                           # one GPU, LIBERO's objects
    taskset -c 0,1 python bench/drawing.py --device cpu --num_envs 1 --rates 5 --seconds 2   # shows that it works

`--num_envs` processes, each with an environment, draw `--rates` pictures a second in all, either as MuJoCo draws them
or with the triangles chosen on the CPU first (`spare_gpu`, in software always so). Each way and idleness alternate in
one run. The cost of a picture is the share of time that the product lost, over the pictures drawn.
"""

import argparse
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from spvla.benchmarks.libero import assets, suites
from spvla.benchmarks.libero.env import LiberoEnv

STOP, IDLE, OWN, CHOSEN = range(4)  # what the environments are told to do
WAYS = {IDLE: "idle", OWN: "MuJoCo's own", CHOSEN: "chosen"}
ROWS, WIDTH, HIDDEN = 4640, 4096, 22016  # of the product: gate and up of one layer, for 16 prompts


@dataclass
class Orders:
    """Shared with the environments' processes."""

    way: Any
    rate: Any  # pictures a second of each
    drawn: Any  # by each; one stands for "ready"
    picture_s: Any


def main() -> None:
    args = arguments()
    processes = multiprocessing.get_context("spawn")
    orders = Orders(
        way=processes.Value("i", IDLE),
        rate=processes.Value("d", 1.0),
        drawn=processes.Array("l", args.num_envs),
        picture_s=processes.Array("d", args.num_envs),
    )
    kind = {"target": draw, "daemon": True}
    workers = [processes.Process(args=(i, args.task_suite_name, orders), **kind) for i in range(args.num_envs)]
    for worker in workers:
        worker.start()
    while min(orders.drawn) == 0:
        if dead := [w.exitcode for w in workers if w.exitcode]:
            raise SystemExit(f"an environment ended with exit code {dead[0]}; what it said stands above")
        time.sleep(0.2)
    product = Product(args.device)
    product.mean_s(args.seconds)  # the card warms up
    for rate in map(float, args.rates.split(",")):
        for way in (IDLE, OWN, CHOSEN) * args.rounds:
            orders.way.value, orders.rate.value = way, rate / args.num_envs
            time.sleep(0.5)
            drawn, start = sum(orders.drawn), time.monotonic()
            product_s = product.mean_s(args.seconds)
            pictures = (sum(orders.drawn) - drawn) / (time.monotonic() - start)
            if way == IDLE:
                alone_s = product_s
                continue
            cost_ms = 1000 * (1 - alone_s / product_s) / max(pictures, 1e-9)
            took_ms = 1000 * statistics.median(orders.picture_s)
            print(
                f"{WAYS[way]:>12}: {pictures:5.0f} pictures/s, product {product_s / alone_s:.3f} of its time alone; "
                f"a picture costs {cost_ms:.2f} ms and takes {took_ms:.1f}",
                flush=True,
            )
    orders.way.value = STOP
    for worker in workers:
        worker.join()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--task_suite_name", choices=tuple(suites.SUITES), default="libero_spatial")
    parser.add_argument("--num_envs", type=int, default=10)
    parser.add_argument("--rates", default="100,200", help="pictures a second of all environments together")
    parser.add_argument("--seconds", type=float, default=2.5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


def draw(number: int, suite: str, orders: Orders) -> None:
    """An environment's process."""
    with LiberoEnv(suite, number % len(suites.tasks(suite)), assets.resolve(None), spare_gpu=True) as env:
        env.reset(0)
        env.image()
        chosen = env.renderer.fine
        orders.drawn[number] = 1
        due_s = time.monotonic()
        while (way := orders.way.value) != STOP:
            time.sleep(0.02 if way == IDLE else max(0.0, due_s - time.monotonic()))
            if way == IDLE:
                due_s = time.monotonic() + number / 100
                continue
            due_s = max(due_s + 1 / orders.rate.value, time.monotonic() - 0.05)
            env.renderer.fine = chosen if way == CHOSEN else None
            start = time.monotonic()
            env.image()
            orders.picture_s[number] += 0.1 * (time.monotonic() - start - orders.picture_s[number])
            orders.drawn[number] += 1


class Product:
    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        like = {"device": device, "dtype": torch.bfloat16 if self.on_gpu else torch.float32}
        rows = ROWS if self.on_gpu else ROWS // 64
        self.x, self.weight = torch.randn(rows, WIDTH, **like), torch.randn(HIDDEN, WIDTH, **like)

    def mean_s(self, seconds: float) -> float:
        count, start = 0, time.monotonic()
        while time.monotonic() - start < seconds:
            for _ in range(20 if self.on_gpu else 1):
                F.linear(self.x, self.weight)
                count += 1
            if self.on_gpu:
                torch.cuda.synchronize()
        return (time.monotonic() - start) / count


if __name__ == "__main__":
    main()
