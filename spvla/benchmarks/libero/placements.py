"""Where LIBERO's resets put things, and what it hides from its init states: where the furniture stands.

Cabinets, stoves and racks have no joint to the world, so their poses are no part of qpos. At every reset LIBERO draws
them, with everything else, from numpy's global generator: episode i of an evaluation is the (i+1)-th hard reset after
seed(0), whatever its init state. Here the draws are replayed, in the same order, without building a model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from spvla.benchmarks.libero.stock import MAX_RESETS, RandomizationError, drawing_from
from spvla.errors import InfrastructureError


@dataclass(frozen=True)
class Pose:
    """Where one fixture's body stands in the world."""

    body: int
    position: tuple[float, float, float]
    quaternion: np.ndarray  # (4,) w, x, y, z


@dataclass(frozen=True)
class Placement:
    """What one hard reset drew."""

    fixtures: tuple[Pose, ...]
    objects: np.ndarray  # (nq,) qpos of what has joints; the robot's entries are the model's own


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """All that decides how a trial or a demonstration begins."""

    state: np.ndarray  # (1 + nq + nv,) float64: time, qpos, qvel
    placement: Placement  # of the reset before it: where the furniture stands, and what the solver starts from


class Placements:
    """A task's placements, episode after episode, worked out as far as asked for and kept."""

    def __init__(self, problem: Any, *, seed: int) -> None:
        """`problem` is LIBERO's, as built and not yet reset."""
        self.problem = problem
        self.model, self.data = problem.sim.model._model, problem.sim.data._data
        self.properties = list(problem.object_property_initializers)
        self.resets = 0
        self.known: list[Placement] = []
        self.generator = np.random.RandomState(seed)

    def episode(self, number: int) -> Placement:
        """What was drawn for episode `number`. Overwrites `data` and the fixtures' poses in the model."""
        with drawing_from(self.generator):
            while number >= len(self.known):
                self.known.append(self._next())
        return self.known[number]

    def _next(self) -> Placement:
        for _ in range(MAX_RESETS):
            self.resets += 1
            try:
                return self._draw()
            except RandomizationError:  # objects could not be placed: LIBERO resets again
                continue
        raise InfrastructureError(f"{self.problem.bddl_file_name}: no room for its objects in {MAX_RESETS} resets")

    def _draw(self) -> Placement:
        """One hard reset's draws, in LIBERO's order."""
        mujoco.mj_resetData(self.model, self.data)
        np.random.randn(len(self.problem.robots[0].init_qpos))  # joint noise, scaled by 0
        # LIBERO keeps its list of drawers and knobs over resets and appends to it each time.
        return place(self.problem, self.properties * (1 + self.resets))


def place(problem: Any, properties: Iterable[Any]) -> Placement:
    """Draws a place for everything, as a reset does: drawers and knobs first.

    What stands on or in furniture is placed by the furniture's sites, read where they are before it is moved: LIBERO's
    samplers add its drawn pose themselves. A built model's furniture has been moved, so it is put back first.

    `data` must be as after mj_resetData; it and the model's poses are overwritten. Raises RandomizationError where
    there is no room.
    """
    model, data = problem.sim.model._model, problem.sim.data._data
    model.body_pos[:], model.body_quat[:] = problem.loaded_poses
    for prop in properties:
        problem.object_states_dict[prop.name].set_joint(prop.sample())
    mujoco.mj_kinematics(model, data)
    placed = problem.placement_initializer.sample()
    placed = problem.conditional_placement_initializer.sample(problem.sim, placed)
    placed = problem.conditional_placement_on_objects_initializer.sample(placed)
    fixtures = []
    for position, quaternion, thing in placed.values():
        if thing.name in problem.fixtures_dict:
            fixtures.append(Pose(model.body(thing.root_body).id, position, np.array(quaternion)))
        else:
            problem.sim.data.set_joint_qpos(thing.joints[-1], np.concatenate([position, quaternion]))
    return Placement(tuple(fixtures), data.qpos.copy())
