"""How LIBERO's tasks lie and look once they have settled, and how far this machine's are from the original's.

The package carries a reference of the forty tasks that are evaluated: stock LIBERO's, made by bench/world_reference.py
under the MuJoCo of published checkpoints, with LIBERO's own objects and Mesa's software renderer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np

REFERENCE = Path(__file__).with_name("world.npz")
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
INIT_STATES = (0, 3)  # of each task; furniture stands elsewhere in each
WAIT_STEPS = 10
WAIT = np.array([0.0, 0, 0, 0, 0, 0, -1])
SIDE = 16  # of a reference's frame: each of its pixels is the mean of 16 x 16

# Below these is what other CPUs' kernels and other drivers' rounding do (four tasks under MuJoCo 3.2.7: 1e-10 mm and 3
# levels); a bowl that rests elsewhere is 20 mm off, and a darker floor 60 levels.
SAME_MM = 0.1
SAME_LEVELS = 6

Place = tuple[str, int]  # suite, task


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One init state of a task after the waiting steps."""

    bodies: tuple[str, ...]  # those that move freely
    xpos: np.ndarray  # (len(bodies), 3) metres
    frame: np.ndarray  # (SIDE, SIDE, 3) uint8, the agentview camera's, bottom row first

    @classmethod
    def of(cls, model: mujoco.MjModel, data: mujoco.MjData, image: np.ndarray, side: int = SIDE) -> "Snapshot":
        """`image`: (256, 256, 3) uint8, as the environment gives it."""
        free = model.jnt_bodyid[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
        return cls(
            bodies=tuple(model.body(b).name for b in free), xpos=data.xpos[free].copy(), frame=shrink(image, side)
        )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest of a task's init states."""

    mm: float  # how far a body lies from where it should
    body: str
    levels: int  # of 255, in a pixel of the shrunk frames

    @property
    def moved(self) -> bool:
        return self.mm > SAME_MM

    @property
    def recoloured(self) -> bool:
        return self.levels > SAME_LEVELS

    def __str__(self) -> str:
        said = [f"{self.body.removesuffix('_main')} lies {self.mm:.1f} mm off"] * self.moved
        said += [f"its picture is {self.levels} levels off"] * self.recoloured
        return ", ".join(said)


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """(N, N, 3) uint8 to (side, side, 3), each pixel the mean of those that it covers."""
    cell = len(image) // side
    return np.rint(image.reshape(side, cell, side, cell, 3).mean(axis=(1, 3))).astype(np.uint8)


def difference(ours: Iterable[Snapshot], theirs: Iterable[Snapshot]) -> Difference:
    """Of one task, over the same init states."""
    worst = Difference(mm=0.0, body="", levels=0)
    for a, b in zip(ours, theirs, strict=True):
        off = 1e3 * np.linalg.norm(_positions(a, b.bodies) - b.xpos, axis=1)  # (bodies,)
        levels = int(np.abs(a.frame.astype(int) - b.frame).max())
        mm, body = max((worst.mm, worst.body), (float(off.max()), b.bodies[int(off.argmax())]))
        worst = Difference(mm=mm, body=body, levels=max(worst.levels, levels))
    return worst


def _positions(snapshot: Snapshot, bodies: Iterable[str]) -> np.ndarray:
    """(len(bodies), 3); a body that is not there is infinitely far away."""
    there = dict(zip(snapshot.bodies, snapshot.xpos, strict=True))
    return np.array([there.get(body, np.full(3, np.inf)) for body in bodies])


def save(file: Path, snapshots: Mapping[Place, Iterable[Snapshot]]) -> None:
    arrays = {}
    for (suite, task), of_task in snapshots.items():
        for init_state, snapshot in zip(INIT_STATES, of_task, strict=True):
            at = f"{suite}/{task}/{init_state}"
            arrays[f"{at}/bodies"] = np.array(snapshot.bodies)
            arrays[f"{at}/xpos"], arrays[f"{at}/frame"] = snapshot.xpos, snapshot.frame
    np.savez_compressed(file, **arrays)


def load(file: Path = REFERENCE) -> dict[Place, list[Snapshot]]:
    """A task's snapshots, one for each of INIT_STATES."""
    with np.load(file, allow_pickle=False) as arrays:
        return {
            (suite, task): [_read(arrays, f"{suite}/{task}/{i}") for i in INIT_STATES]
            for suite in SUITES
            for task in range(10)
        }


def _read(arrays: Mapping[str, np.ndarray], at: str) -> Snapshot:
    bodies = tuple(str(name) for name in arrays[f"{at}/bodies"])
    return Snapshot(bodies=bodies, xpos=arrays[f"{at}/xpos"], frame=arrays[f"{at}/frame"])
