"""How much faster a trial's world runs than LIBERO's own, both in this process, in turn, on the same actions.

    python bench/env_step.py [--suite libero_spatial] [--task 0] [--rounds 3] [--steps 60] [--libero_assets DIR]

One round: LIBERO's evaluation environment (two cameras of 256 x 256, rendered at every step) and ours (one camera,
rendered when the policy looks) each reset, settle for 10 steps, and take --steps steps with a picture. Checks on the
way that both end in the same state and picture, and prints a table last.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from spvla.benchmarks.libero import stock  # before libero: it keeps the import silent
from spvla.benchmarks.libero.assets import resolve
from spvla.benchmarks.libero.env import LiberoEnv, task_info
from spvla.render.context import renderer_name

SETTLE = 10
WAIT = np.array([0.0, 0, 0, 0, 0, 0, -1])


@dataclass(frozen=True)
class Round:
    """What one trial took, in seconds as (wall clock, CPU time of all threads), and what it ended in."""

    reset: np.ndarray  # (2,)
    settle: np.ndarray  # (2,) one settling step
    step: np.ndarray  # (2,) one step with its picture
    qpos: np.ndarray
    image: np.ndarray

    def trial(self, steps: int) -> np.ndarray:
        return self.reset + SETTLE * self.settle + steps * self.step


def now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def play_stock(env: object, state: np.ndarray, actions: np.ndarray) -> Round:
    # robosuite frees its textures in whatever context is current, and that must not be ours
    env.sim._render_context_offscreen.gl_ctx.make_current()
    start = now()
    env.reset()
    env.set_init_state(state)
    reset = now()
    for _ in range(SETTLE):
        env.step(WAIT.tolist())
    settled = now()
    for action in actions:
        observation, *_ = env.step(action.tolist())
    step_s = (now() - settled) / len(actions)
    qpos, image = env.sim.data.qpos.copy(), observation["agentview_image"]
    return Round(reset - start, (settled - reset) / SETTLE, step_s, qpos, image)


def play_ours(env: LiberoEnv, number: int, actions: np.ndarray) -> Round:
    start = now()
    env.reset(number)
    reset = now()
    for _ in range(SETTLE):
        env.step(WAIT)
    settled = now()
    for action in actions:
        env.step(action)
        image = env.image()
    step_s = (now() - settled) / len(actions)
    return Round(reset - start, (settled - reset) / SETTLE, step_s, env.data.qpos.copy(), image)


def reaching(steps: int) -> np.ndarray:
    """(steps, 7): down to the table and along it, the gripper closing now and then."""
    rng = np.random.default_rng(0)
    actions = np.repeat(rng.uniform(-1, 1, (steps // 10 + 1, 7)), 10, axis=0)[:steps]
    actions[:, 2] = -0.6
    actions[:, 3:6] *= 0.3
    actions[:, 6] = np.sign(actions[:, 6])
    return actions


def measure(suite: str, task: int, rounds: int, steps: int, assets_folder: Path | None) -> dict:
    from libero.libero.envs import OffScreenRenderEnv

    assets, actions = resolve(assets_folder), reaching(steps)
    started = time.perf_counter()
    ours_env = LiberoEnv(suite, task, assets)
    build_s = time.perf_counter() - started
    ours_env.image()  # the context opens once in an environment's life
    stock.use_assets(assets.path)
    stock.cache_files(stock.MUJOCO_CACHE)  # or its resets would take twice as long
    file = str(task_info(suite, task).bddl_file)
    stock_env = OffScreenRenderEnv(bddl_file_name=file, camera_heights=256, camera_widths=256)
    stock_env.seed(0)
    pairs = []
    for number in range(rounds):
        theirs = play_stock(stock_env, ours_env.init_states[number], actions)
        ours = play_ours(ours_env, number, actions)
        assert np.array_equal(ours.qpos, theirs.qpos), f"round {number}: states differ"
        assert np.array_equal(ours.image, theirs.image), f"round {number}: pictures differ"
        pairs.append((theirs, ours))
    ours_env.close()
    stock_env.close()
    rows = {
        "reset": [(a.reset, b.reset) for a, b in pairs],
        "settling step": [(a.settle, b.settle) for a, b in pairs],
        "step with picture": [(a.step, b.step) for a, b in pairs],
        f"trial of {steps} steps": [(a.trial(steps), b.trial(steps)) for a, b in pairs],
    }
    return {
        "suite": suite,
        "task": task,
        "assets": assets.name,
        "renderer": renderer_name(),
        "rounds": rounds,
        "build_s": build_s,
        "rows": {name: asdict(Row.of(times)) for name, times in rows.items()},
    }


@dataclass(frozen=True)
class Row:
    """Medians over rounds; a ratio is that of one round's two times."""

    stock_ms: float
    ours_ms: float
    ratio: float
    stock_cpu_ms: float  # of all threads: steadier on a busy machine
    ours_cpu_ms: float
    cpu_ratio: float

    @classmethod
    def of(cls, times: list[tuple[np.ndarray, np.ndarray]]) -> "Row":
        theirs, ours = (1e3 * np.array(t) for t in zip(*times, strict=True))  # (rounds, 2)
        wall, cpu = np.median(theirs / ours, axis=0)
        (stock_ms, stock_cpu_ms), (ours_ms, ours_cpu_ms) = np.median(theirs, axis=0), np.median(ours, axis=0)
        return cls(*(float(x) for x in (stock_ms, ours_ms, wall, stock_cpu_ms, ours_cpu_ms, cpu)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="libero_spatial")
    parser.add_argument("--task", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--libero_assets", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    result = measure(args.suite, args.task, args.rounds, args.steps, args.libero_assets)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{args.suite} task {args.task}, {result['assets']} assets, {result['renderer']}, medians of {args.rounds}")
    print(f"{'':<22}{'stock ms':>10}{'ours ms':>10}{'ratio':>9}{'stock CPU':>12}{'ours CPU':>10}{'ratio':>9}")
    for name, row in result["rows"].items():
        print("{:<22}{:>10.1f}{:>10.1f}{:>8.1f}x{:>12.1f}{:>10.1f}{:>8.1f}x".format(name, *row.values()))


if __name__ == "__main__":
    main()
