"""Draw docs/contact_sheet.jpg: the first frame of all forty tasks, five to a row.

    python bench/contact_sheet.py [OUT.jpg] [ASSETS]

ASSETS: an asset folder, or `primitives`; by default the assets in use. Frames are taken after the ten settling steps
of every trial.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from spvla.benchmarks.libero.assets import AssetSet, resolve
from spvla.benchmarks.libero.env import LiberoEnv

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
WAIT = np.array([0.0, 0, 0, 0, 0, 0, -1])
SIDE, COLUMNS = 192, 5


def first_frame(suite: str, task: int, assets: AssetSet) -> Image.Image:
    with LiberoEnv(suite, task, assets) as env:
        env.reset(0)
        for _ in range(10):
            env.step(WAIT)
        return Image.fromarray(np.ascontiguousarray(env.image()[::-1])).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main(out: Path, assets: AssetSet) -> None:
    frames = [first_frame(suite, task, assets) for suite in SUITES for task in range(10)]
    sheet = Image.new("RGB", (COLUMNS * SIDE, len(frames) // COLUMNS * SIDE))
    for k, frame in enumerate(frames):
        sheet.paste(frame, (k % COLUMNS * SIDE, k // COLUMNS * SIDE))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, quality=85)
    print(f"{out}: {len(frames)} first frames, assets {assets.name} ({assets.digest[:16]})")


if __name__ == "__main__":
    arguments = [Path(a) for a in sys.argv[1:]]
    main(arguments[0] if arguments else Path("docs/contact_sheet.jpg"), resolve(*arguments[1:2]))
