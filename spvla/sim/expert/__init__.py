"""Scripted demonstrations: privileged state in, LIBERO's own 7-dimensional actions out, closed loop at 20 Hz."""

from itertools import islice

import numpy as np

from spvla.sim.expert.motion import OPEN, Arm
from spvla.sim.expert.plans import pursue
from spvla.sim.expert.scene import Scene
from spvla.sim.expert.skills import Expert
from spvla.sim.libero import LiberoEnv

SETTLE = np.array([0, 0, 0, 0, 0, 0, OPEN])
AFTERWARDS = 8  # steps to draw back once the task is solved and the hand is empty
SETTLING_STEPS = 10  # objects fall before the hand moves, as in evaluation


def demonstrate(env: LiberoEnv, init_state: int, rng: np.random.Generator) -> list[np.ndarray] | None:
    """(7,) float32 actions that solve the task from `init_state`, after the settling steps; None when they do not.

    The last action leaves the task solved, and there are at most `env.max_steps`. Equal arguments give equal actions.
    """
    env.reset(init_state)
    for _ in range(SETTLING_STEPS):
        env.step(SETTLE)
    scene = Scene(env)
    expert = Expert(scene=scene, arm=Arm(scene=scene, pace=rng.uniform(0.85, 1.0)), rng=rng)
    actions: list[np.ndarray] = []
    solved = 0  # steps since when the task has been solved
    for action in islice(pursue(expert), env.max_steps):
        actions.append(action.astype(np.float32))
        solved = solved + 1 if env.step(actions[-1]) else 0
        if solved > AFTERWARDS and expert.arm.gripper == OPEN:
            break
    return actions if solved else None
