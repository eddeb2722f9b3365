"""Drawn starts beside LIBERO's init states, before and after they settle: numbers for every task, and a picture.

    python bench/starts.py [--takes 50] [--suites libero_spatial] [--num_workers 2] [--out FOLDER]

A line a thing: mean and standard deviation of its x and y in both sets, and how many standard errors the means lie
apart (Welch's t); for the arm's joints, their errors from rest. FOLDER gets starts.json and starts.svg.
"""

import argparse
import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spvla.benchmarks.libero.assets import AssetSet, resolve
from spvla.benchmarks.libero.env import LiberoEnv, tasks
from spvla.benchmarks.libero.starts import drawn_start
from spvla.progress import Progress

SUITES = "libero_spatial,libero_object,libero_goal,libero_10"


@dataclass(frozen=True, kw_only=True)
class Work:
    """One task."""

    suite: str
    task: int
    assets: AssetSet
    takes: int
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", type=lambda text: text.split(","), default=SUITES.split(","))
    parser.add_argument("--takes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--num_workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--assets", type=Path, default=None, help="default: as spvla collect finds them")
    parser.add_argument("--out", type=Path, default=Path("."))
    flags = parser.parse_args()
    how = {"assets": resolve(flags.assets), "takes": flags.takes, "seed": flags.seed}
    works = [Work(suite=suite, task=task.id, **how) for suite in flags.suites for task in tasks(suite)]
    rows: list[dict[str, Any]] = []
    pool = multiprocessing.get_context("spawn").Pool(flags.num_workers)
    with pool, Progress("starts", total=len(works), unit="tasks") as progress:
        for row in pool.imap(compare, works):
            rows.append(row)
            progress.update(len(rows))
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "starts.json").write_text(json.dumps(rows))
    for row in rows:
        print(table(row))
    print(overall(rows))
    draw(rows, flags.out / "starts.svg")


def compare(work: Work) -> dict[str, Any]:
    """Where each thing begins: (N, 2) x and y of every object, one number of every drawer, (N, 7) of the arm."""
    with LiberoEnv(work.suite, work.task, work.assets) as env:
        width = 1 + env.model.nq
        starts = [drawn_start(env, seed=work.seed, take=k) for k in range(work.takes)]
        drawn = np.array([start.state[1:width] for start in starts])
        test = env.init_states[:, 1:width]
        arm = env.robot._ref_joint_pos_indexes
        rest = env.robot.init_qpos
        columns = {"arm": (arm, "rad")}
        for name, thing in env.env.objects_dict.items():
            at = int(env.model.joint(thing.joints[-1]).qposadr[0])
            columns[name] = ([at, at + 1], "m")
        for name, thing in env.env.fixtures_dict.items():
            for joint in thing.joints:
                columns[f"{name} {joint.removeprefix(name + '_')}"] = ([int(env.model.joint(joint).qposadr[0])], "")
        things = {}
        for name, (at, unit) in columns.items():
            offset = rest if name == "arm" else 0.0
            things[name] = {
                "unit": unit,
                "test": (test[:, at] - offset).tolist(),
                "drawn": (drawn[:, at] - offset).tolist(),
            }
        placed = [start.placement for start in starts], [env.placements.episode(i) for i in range(len(test))]
        for number, pose in enumerate(placed[0][0].fixtures):
            ours, theirs = ([p.fixtures[number].position[:2] for p in placements] for placements in placed)
            things[env.model.body(pose.body).name] = {"unit": "m", "test": theirs, "drawn": ours}
        exact = int(sum((drawn == state).all(1).any() for state in test))
    return {"suite": work.suite, "task": work.task, "instruction": env.instruction, "things": things, "equal": exact}


def welch(one: np.ndarray, other: np.ndarray) -> float:
    """Standard errors between two means; 0 where nothing varies and nothing differs."""
    error = np.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other))
    difference = abs(one.mean() - other.mean())
    return float(difference / error) if error > 1e-9 else (0.0 if difference < 1e-6 else float("inf"))


def table(row: dict[str, Any]) -> str:
    lines = [f"\n{row['suite']} {row['task']}  {row['instruction']}"]
    for name, thing in row["things"].items():
        test, drawn = np.array(thing["test"]), np.array(thing["drawn"])
        if name == "arm":
            test, drawn = test.reshape(-1, 1), drawn.reshape(-1, 1)
        cells = []
        for axis in range(test.shape[1]):
            a, b = test[:, axis], drawn[:, axis]
            cells.append(f"{a.mean():8.4f} ± {a.std():.4f} | {b.mean():8.4f} ± {b.std():.4f} | {welch(a, b):4.1f}")
        lines.append(f"  {name:<34} " + "   ".join(cells))
    return "\n".join(lines)


def overall(rows: list[dict[str, Any]]) -> str:
    """One line a suite."""
    lines = ["\nsuite           columns  |t| median, most  spread drawn / test  arm's spread test, drawn  equal starts"]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        ts, ratios, arms, equal = [], [], [[], []], 0
        for row in (row for row in rows if row["suite"] == suite):
            equal += row["equal"]
            for name, thing in row["things"].items():
                test, drawn = np.array(thing["test"]), np.array(thing["drawn"])
                if name == "arm":
                    arms[0].append(test.std())
                    arms[1].append(drawn.std())
                    continue
                for axis in range(test.shape[1]):
                    ts.append(welch(test[:, axis], drawn[:, axis]))
                    if test[:, axis].std() > 1e-6:
                        ratios.append(drawn[:, axis].std() / test[:, axis].std())
        lines.append(
            f"{suite:<15} {len(ts):>7}  {np.median(ts):>10.2f}, {max(ts):.2f} {np.median(ratios):>20.2f}"
            f" {np.mean(arms[0]):>20.4f}, {np.mean(arms[1]):.4f} {equal:>13}"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel a task: test starts as circles, drawn ones as dots, things told apart by colour."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    suites = list(dict.fromkeys(row["suite"] for row in rows))
    figure, axes = pyplot.subplots(len(suites), 10, figsize=(24, 2.6 * len(suites)), squeeze=False)
    for row in rows:
        panel = axes[suites.index(row["suite"])][row["task"]]
        names = [name for name, thing in row["things"].items() if thing["unit"] == "m"]
        for number, name in enumerate(names):
            test, drawn = (np.array(row["things"][name][key]) for key in ("test", "drawn"))
            colour = f"C{number}"
            panel.scatter(test[:, 1], test[:, 0], s=14, facecolors="none", edgecolors=colour, linewidths=0.6)
            panel.scatter(drawn[:, 1], drawn[:, 0], s=2, color=colour)
        panel.set_title(f"{row['suite'].removeprefix('libero_')} {row['task']}", fontsize=8)
        panel.set_aspect("equal")
        panel.invert_yaxis()  # as the camera looks: the robot is at the far side
        panel.tick_params(labelsize=5)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
