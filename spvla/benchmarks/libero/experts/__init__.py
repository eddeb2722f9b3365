"""Scripted demonstrations: privileged state in, LIBERO's own 7-dimensional actions out, closed loop at 20 Hz."""

from dataclasses import dataclass
from itertools import islice

import numpy as np

from spvla.benchmarks.libero.env import LiberoEnv
from spvla.benchmarks.libero.experts.motion import OPEN, Arm
from spvla.benchmarks.libero.experts.noise import Noise
from spvla.benchmarks.libero.experts.plans import pursue
from spvla.benchmarks.libero.experts.scene import Scene
from spvla.benchmarks.libero.experts.skills import Expert
from spvla.benchmarks.libero.placements import Start
from spvla.benchmarks.libero.sampling import View
from spvla.benchmarks.libero.starts import settle

AFTERWARDS = 8  # steps to draw back once the task is solved and the hand is empty
REHEARSALS = 8  # attempts from the same start, each with other habits and other grasps, before it is given up


@dataclass(frozen=True, kw_only=True, eq=False)
class Demonstration:
    """T steps that solve a task: what the sensors showed, and what the expert answers to it."""

    actions: np.ndarray  # (T, 7) float32: the expert's own
    played: np.ndarray  # (T, 7) float32: what was carried out, the same but for noise
    views: list[View]  # T: before each action
    attempts: int  # made until this one, itself counted


def demonstrate(env: LiberoEnv, start: Start, rng: np.random.Generator, *, noise: float = 0.0) -> Demonstration | None:
    """Solves the task from `start`, after the settling steps; None when that fails.

    The expert rehearses: what fails is tried again from the start with other grasps, and the first attempt that solves
    the task is the demonstration. Its last action leaves the task solved, and there are at most `env.max_steps`. Equal
    arguments give equal actions.

    `noise` disturbs what is carried out (see `Noise`). The expert looks at the world before each step, so its actions
    answer to what the disturbed hand has come to.
    """
    attempts = (attempt(env, start, rng, rehearsal=rehearsal, noise=noise) for rehearsal in range(REHEARSALS))
    return next((found for found in attempts if found is not None), None)


def attempt(
    env: LiberoEnv, start: Start, rng: np.random.Generator, *, rehearsal: int, noise: float
) -> Demonstration | None:
    """One attempt from the start; later ones choose among more grasps, and only the last mends what went wrong."""
    env.begin(start)
    settle(env)
    scene = Scene(env)
    arm = Arm(scene=scene, pace=rng.uniform(0.85, 1.0))
    expert = Expert(scene=scene, arm=arm, rng=rng, rehearsal=rehearsal, persists=rehearsal == REHEARSALS - 1)
    disturbed = Noise(noise, rng)
    actions: list[np.ndarray] = []
    played: list[np.ndarray] = []
    views: list[View] = []
    solved = 0  # steps since when the task has been solved
    for action in islice(pursue(expert), env.max_steps):
        views.append(env.sample.keep())
        actions.append(action.astype(np.float32))
        played.append(disturbed(actions[-1]))
        solved = solved + 1 if env.step(played[-1]) else 0
        if solved > AFTERWARDS and expert.arm.gripper == OPEN:
            break
    if not solved:
        return None
    return Demonstration(actions=np.array(actions), played=np.array(played), views=views, attempts=rehearsal + 1)
