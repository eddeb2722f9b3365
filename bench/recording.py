"""What a recorded take costs: drawing a start, demonstrating, filming. Many processes at once, as in a collection.

    python bench/recording.py [--suite libero_object] [--num_workers 16] [--seconds 40] [--noise 0.12]

Each process opens one task and makes takes until the time is over, once with triangles chosen on the CPU (which spares
the GPU) and once without. A line each: takes a second of all processes, and the seconds of a take in each part.
"""

import argparse
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spvla.benchmarks.libero.assets import AssetSet, resolve
from spvla.benchmarks.libero.env import LiberoEnv
from spvla.benchmarks.libero.experts import demonstrate
from spvla.benchmarks.libero.recorders import filmed
from spvla.benchmarks.libero.starts import drawn_start
from spvla.render.context import draw_on_gpu, draw_on_one_core, renderer_name

PARTS = ("start", "demonstrate", "film")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one process does."""

    number: int
    suite: str
    assets: AssetSet
    noise: float
    seconds: float
    spare_gpu: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--num_workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--assets", type=Path, default=None, help="default: as spvla collect finds them")
    flags = parser.parse_args()
    how = {"suite": flags.suite, "assets": resolve(flags.assets), "noise": flags.noise, "seconds": flags.seconds}
    print(f"{flags.suite}, {flags.num_workers} processes, {renderer_name()}")
    print(f"{'triangles':>9} {'takes/s':>8} {'pictures/s':>11} " + "".join(f"{part + ', s':>15}" for part in PARTS))
    for spare_gpu in (True, False):
        works = [Work(number=i, spare_gpu=spare_gpu, **how) for i in range(flags.num_workers)]
        with multiprocessing.get_context("spawn").Pool(flags.num_workers) as pool:
            rows = pool.map(measure, works, chunksize=1)
        takes, pictures = np.sum([row[0] for row in rows], axis=0)
        parts = np.concatenate([row[1] for row in rows]).mean(0)
        name = "chosen" if spare_gpu else "all"
        print(f"{name:>9} {takes:>8.2f} {pictures:>11.0f} " + "".join(f"{s:>15.2f}" for s in parts), flush=True)


def measure(work: Work) -> tuple[tuple[float, float], np.ndarray]:
    """(takes, pictures) a second of this process; (N, 3) seconds of each take's parts."""
    draw_on_one_core()
    draw_on_gpu(work.number)
    task, rows, pictures = work.number % 10, [], 0
    with LiberoEnv(work.suite, task, work.assets, spare_gpu=work.spare_gpu) as env:
        env.reset(0)
        env.image()
        env.step(np.zeros(7))  # numba has compiled, textures are there
        first_s = time.monotonic()
        while not rows or time.monotonic() - first_s < work.seconds:
            times = [time.monotonic()]
            take = work.number + 1000 * len(rows)
            start = drawn_start(env, seed=0, take=take)
            times.append(time.monotonic())
            found = demonstrate(env, start, np.random.default_rng(take), noise=work.noise)
            times.append(time.monotonic())
            if found:
                filmed(env, found, source="")
                pictures += 2 * len(found.actions)
            rows.append(np.diff([*times, time.monotonic()]))
    total_s = float(np.sum(rows))
    return (len(rows) / total_s, pictures / total_s), np.array(rows)


if __name__ == "__main__":
    main()
