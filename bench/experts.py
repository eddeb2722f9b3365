"""How often the scripted experts solve each task, and in how many steps. Nothing is rendered.

    python bench/experts.py --suite libero_object --init_states 50 [--tasks 0,3] [--assets DIR] [--out FILE]

Prints a Markdown table, a line as each task ends, and writes the same as JSON.
"""

import argparse
import time
from pathlib import Path
from statistics import mean

import numpy as np

from spvla.benchmarks.libero.assets import AssetSet, resolve
from spvla.benchmarks.libero.env import LiberoEnv, TaskInfo, tasks
from spvla.benchmarks.libero.experts import demonstrate
from spvla.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--tasks", type=lambda text: [int(word) for word in text.split(",")], default=None)
    parser.add_argument("--init_states", type=int, default=50)
    parser.add_argument("--assets", type=Path, default=None, help="default: as spvla collect finds them")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    flags = parser.parse_args()
    assets = resolve(flags.assets)
    print(f"{flags.suite}, assets {assets.name}, init states 0 to {flags.init_states - 1}, seed {flags.seed}\n")
    print("| task | instruction | solved | failed from | steps, mean and most | s each |\n|---|---|---|---|---|---|")
    chosen = [task for task in tasks(flags.suite) if flags.tasks is None or task.id in flags.tasks]
    rows = [measure(flags.suite, task, assets, flags.init_states, flags.seed) for task in chosen]
    solved, tried = sum(int(row["solved"]) for row in rows), flags.init_states * len(rows)
    print(f"| all | | {solved}/{tried} ({100 * solved / tried:.1f}%) | | | |")
    if flags.out:
        write_json(flags.out, {"suite": flags.suite, "assets": assets.name, "digest": assets.digest, "tasks": rows})


def measure(suite: str, task: TaskInfo, assets: AssetSet, init_states: int, seed: int) -> dict[str, object]:
    started, lengths, failed = time.monotonic(), [], []
    with LiberoEnv(suite, task.id, assets) as env:
        for init_state in range(init_states):
            actions = demonstrate(env, init_state, np.random.default_rng([seed, task.id, init_state]))
            if actions is None:
                failed.append(init_state)
            else:
                lengths.append(len(actions))
    seconds = (time.monotonic() - started) / init_states
    steps = f"{mean(lengths):.0f}, {max(lengths)}" if lengths else ""
    missed = ", ".join(map(str, failed)) or "none"
    score = f"{len(lengths)}/{init_states}"
    print(f"| {task.id} | {task.instruction} | {score} | {missed} | {steps} | {seconds:.1f} |", flush=True)
    return {"task": task.id, "solved": len(lengths), "failed": failed, "lengths": lengths, "seconds_each": seconds}


if __name__ == "__main__":
    main()
