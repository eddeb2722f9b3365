"""What LIBERO hides from its init states: where the furniture stands in a task's i-th episode.

Cabinets, stoves and racks have no joint to the world, so their poses are no part of qpos. At every reset LIBERO draws
them, with everything else, from numpy's global generator: episode i of an evaluation is the (i+1)-th hard reset after
seed(0), whatever its init state. Here the draws are replayed, in the same order, without building a model.
"""

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
        """What was drawn for episode `number`. Overwrites `data`; the model must be as built."""
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
        problem = self.problem
        mujoco.mj_resetData(self.model, self.data)
        np.random.randn(len(problem.robots[0].init_qpos))  # joint noise, scaled by 0
        # LIBERO keeps its list of drawers and knobs over resets and appends to it each time.
        for _ in range(1 + self.resets):
            for prop in self.properties:
                problem.object_states_dict[prop.name].set_joint(prop.sample())
        mujoco.mj_kinematics(self.model, self.data)
        placed = problem.placement_initializer.sample()
        placed = problem.conditional_placement_initializer.sample(problem.sim, placed)
        placed = problem.conditional_placement_on_objects_initializer.sample(placed)
        fixtures = []
        for position, quaternion, thing in placed.values():
            if thing.name in problem.fixtures_dict:
                fixtures.append(Pose(self.model.body(thing.root_body).id, position, np.array(quaternion)))
            else:
                problem.sim.data.set_joint_qpos(thing.joints[-1], np.concatenate([position, quaternion]))
        return Placement(tuple(fixtures), self.data.qpos.copy())
