"""Scripted demonstrations: privileged state in, LIBERO's own 7-dimensional actions out, closed loop at 20 Hz."""

from itertools import islice

import numpy as np

from spvla.benchmarks.libero.env import LiberoEnv
from spvla.benchmarks.libero.experts.motion import OPEN, Arm
from spvla.benchmarks.libero.experts.plans import pursue
from spvla.benchmarks.libero.experts.scene import Scene
from spvla.benchmarks.libero.experts.skills import Expert

SETTLE = np.array([0, 0, 0, 0, 0, 0, OPEN])
AFTERWARDS = 8  # steps to draw back once the task is solved and the hand is empty
SETTLING_STEPS = 10  # objects fall before the hand moves, as in evaluation
REHEARSALS = 8  # attempts from the same init state, each with other habits and other grasps, before it is given up


def demonstrate(env: LiberoEnv, init_state: int, rng: np.random.Generator) -> list[np.ndarray] | None:
    """(7,) float32 actions that solve the task from `init_state`, after the settling steps; None when they do not.

    The expert rehearses: what fails is tried again from the start with other grasps, and the first attempt that solves
    the task is the demonstration. Its last action leaves the task solved, and there are at most `env.max_steps`. Equal
    arguments give equal actions.
    """
    attempts = (attempt(env, init_state, rng, rehearsal=rehearsal) for rehearsal in range(REHEARSALS))
    return next((actions for actions in attempts if actions is not None), None)


def attempt(env: LiberoEnv, init_state: int, rng: np.random.Generator, *, rehearsal: int) -> list[np.ndarray] | None:
    """One attempt from a fresh reset; later ones choose among more grasps, and only the last mends what went wrong."""
    env.reset(init_state)
    for _ in range(SETTLING_STEPS):
        env.step(SETTLE)
    scene = Scene(env)
    arm = Arm(scene=scene, pace=rng.uniform(0.85, 1.0))
    expert = Expert(scene=scene, arm=arm, rng=rng, rehearsal=rehearsal, persists=rehearsal == REHEARSALS - 1)
    actions: list[np.ndarray] = []
    solved = 0  # steps since when the task has been solved
    for action in islice(pursue(expert), env.max_steps):
        actions.append(action.astype(np.float32))
        solved = solved + 1 if env.step(actions[-1]) else 0
        if solved > AFTERWARDS and expert.arm.gripper == OPEN:
            break
    return actions if solved else None
