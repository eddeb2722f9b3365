"""The two tasks that show most clearly under which MuJoCo a world was made; docs/worlds.png has two such columns.

    python bench/world_pictures.py --out old.png
    pip install --target /tmp/newer --no-deps mujoco==3.8.1
    PYTHONPATH=/tmp/newer python bench/world_pictures.py --left old.png --out docs/worlds.png

Above libero_object's first task, whose floor is darker from 3.3.3 on; below libero_spatial's task 5, whose bowl rests
elsewhere from 3.4.0 on, enlarged. Each after the waiting steps of its first init state, as a policy sees it.
"""

import argparse
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

from spvla.benchmarks.libero import stock  # before mujoco's other users: it keeps the import silent
from spvla.benchmarks.libero.assets import resolve
from spvla.benchmarks.libero.env import LiberoEnv
from spvla.benchmarks.libero.world import WAIT, WAIT_STEPS

GAP = 8  # white pixels between pictures
BOWL = slice(50, 178), slice(6, 134)  # rows and columns of the lower picture that are shown, twice as large


def picture(suite: str, task: int) -> np.ndarray:
    """(256, 256, 3) uint8, upright."""
    with LiberoEnv(suite, task, resolve()) as env:
        env.reset(0)
        for _ in range(WAIT_STEPS):
            env.step(WAIT)
        report(env)
        return env.image()[::-1, ::-1]


def report(env: LiberoEnv) -> None:
    """How far the bowl to be moved lies from the ramekin's centre, where there is one, in mm."""
    names = [env.model.body(i).name for i in range(env.model.nbody)]
    ramekins = [n for n in names if n.startswith("glazed_rim_porcelain_ramekin") and n.endswith("_main")]
    for ramekin in ramekins:
        away = env.data.body("akita_black_bowl_1_main").xpos - env.data.body(ramekin).xpos
        print(f"{env.suite} task {env.task}: bowl {1e3 * np.linalg.norm(away[:2]):.1f} mm beside the ramekin")


def column() -> np.ndarray:
    above, below = picture("libero_object", 0), picture("libero_spatial", 5)
    print(f"mean colour above: {above.mean(axis=(0, 1)).round(1)}, MuJoCo {stock.mujoco.__version__}")
    below = below[BOWL].repeat(2, axis=0).repeat(2, axis=1)
    return np.concatenate([above, np.full((GAP, 256, 3), 255, np.uint8), below])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--left", type=Path, help="a column made before, to stand at the left of this one")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    columns = [imageio.imread(args.left)[..., :3]] if args.left else []
    columns.append(column())
    gap = np.full((len(columns[0]), GAP, 3), 255, np.uint8)
    joined = columns[0] if len(columns) == 1 else np.concatenate([columns[0], gap, columns[1]], axis=1)
    imageio.imwrite(args.out, joined)


if __name__ == "__main__":
    main()
