"""How often the scripted experts solve each task, and in how many steps. Nothing is rendered.

    python bench/experts.py --out FILE [--suites libero_goal,libero_10] [--tasks 0,3] [--takes 50] [--starts fresh]
                            [--noise 0.12] [--num_workers 16] [--assets DIR]

Take k begins at init state k, or at the k-th drawn start. FILE gets a line of JSON a take, as takes end; the same
command goes on where it stopped. At the end a Markdown table of each suite is printed.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from spvla.benchmarks.libero.assets import AssetSet, resolve
from spvla.benchmarks.libero.env import LiberoEnv, tasks
from spvla.benchmarks.libero.experts import demonstrate
from spvla.benchmarks.libero.starts import drawn_start, initial_start
from spvla.progress import Progress

SUITES = "libero_spatial,libero_object,libero_goal,libero_10"
BLOCK = 5  # takes that a process makes before it says so


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some takes of one task."""

    suite: str
    task: int
    takes: tuple[int, ...]
    assets: AssetSet
    how: dict[str, Any]  # starts, noise, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", type=lambda text: text.split(","), default=SUITES.split(","))
    parser.add_argument("--tasks", type=lambda text: [int(word) for word in text.split(",")], default=None)
    parser.add_argument("--takes", type=int, default=50)
    parser.add_argument("--starts", choices=("test", "fresh"), default="test")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--num_workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--assets", type=Path, default=None, help="default: as spvla collect finds them")
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    assets = resolve(flags.assets)
    how = {"starts": flags.starts, "noise": flags.noise, "seed": flags.seed}
    same = how | {"assets": assets.digest}
    done = [row for row in read(flags.out) if same.items() <= row.items()]
    known = {(row["suite"], row["task"], row["take"]) for row in done}
    blocks = []
    for first in range(0, flags.takes, BLOCK):
        for suite in flags.suites:
            for task in tasks(suite):
                takes = [k for k in range(first, min(first + BLOCK, flags.takes)) if (suite, task.id, k) not in known]
                if takes and (flags.tasks is None or task.id in flags.tasks):
                    blocks.append(Block(suite=suite, task=task.id, takes=tuple(takes), assets=assets, how=how))
    done += run(blocks, flags.out, same, flags.num_workers)
    print(f"assets {assets.name}, {how}")
    for suite in flags.suites:
        print(table(suite, [row for row in done if row["suite"] == suite and row["take"] < flags.takes]))


def run(blocks: list[Block], out: Path, same: dict[str, Any], num_workers: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    total = sum(len(block.takes) for block in blocks)
    pool = multiprocessing.get_context("spawn").Pool(num_workers)
    with pool, out.open("a") as file, Progress("experts", total=total, unit="takes") as progress:
        for found in pool.imap_unordered(measure, blocks):
            for row in found:
                rows.append(same | row)
                file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            progress.update(len(rows), failed=sum(not row["solved"] for row in rows))
    return rows


def measure(block: Block) -> list[dict[str, Any]]:
    """One row a take: whether it was solved, in how many steps, attempts and seconds."""
    rows = []
    with LiberoEnv(block.suite, block.task, block.assets) as env:
        for take in block.takes:
            start_s = time.monotonic()
            row = {"suite": block.suite, "task": block.task, "take": take}
            try:
                row |= play(env, take, **block.how)
            except Exception as e:  # a crash is a row, too, and stops no other take
                row |= {"solved": False, "error": f"{type(e).__name__}: {e}"}
            rows.append(row | {"seconds": round(time.monotonic() - start_s, 2)})
    return rows


def play(env: LiberoEnv, take: int, *, starts: str, noise: float, seed: int) -> dict[str, Any]:
    start = drawn_start(env, seed=seed, take=take) if starts == "fresh" else initial_start(env, take)
    found = demonstrate(env, start, np.random.default_rng([seed, env.task, take]), noise=noise)
    return {"solved": True, "steps": len(found.actions), "attempts": found.attempts} if found else {"solved": False}


def read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line


def table(suite: str, rows: Iterable[dict[str, Any]]) -> str:
    head = "| task | instruction | solved | failed from | at once | steps, mean and most | s each |"
    lines = [f"\n## {suite}\n", head, "|---|---|---|---|---|---|---|"]
    rows = list(rows)
    for task in tasks(suite):
        mine = sorted((row for row in rows if row["task"] == task.id), key=lambda row: row["take"])
        if mine:
            lines.append(f"| {task.id} | {task.instruction} | {summary(mine)} |")
    return "\n".join([*lines, f"| all | | {summary(sorted(rows, key=lambda row: row['take']), failures=False)} |"])


def summary(rows: list[dict[str, Any]], *, failures: bool = True) -> str:
    solved = [row for row in rows if row["solved"]]
    failed = ", ".join(str(row["take"]) for row in rows if not row["solved"]) or "none"
    steps = f"{mean(row['steps'] for row in solved):.0f}, {max(row['steps'] for row in solved)}" if solved else ""
    at_once = sum(row["attempts"] == 1 for row in solved)
    seconds = mean(row["seconds"] for row in rows) if rows else 0.0
    cells = [f"{len(solved)}/{len(rows)}", failed if failures else "", at_once, steps, f"{seconds:.1f}"]
    return " | ".join(map(str, cells))


if __name__ == "__main__":
    main()
