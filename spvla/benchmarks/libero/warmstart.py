"""Where MuJoCo's solver starts from, which decides a step's last bits.

The solver begins at the last solution, `qacc_warmstart`, and in the MuJoCo of published checkpoints every `mj_forward`
leaves a new one. robosuite calls it where nothing has moved: once before each substep, once more when its controller
reads the arm, and several times in a reset. A trial is equal to the original's to the bit only if each of them is made
again; what has not changed (positions, contacts, velocities: nearly all of its time) is left out.
"""

from typing import Any

import mujoco
import numpy as np

MOVED = mujoco.mjtStage.mjSTAGE_VEL  # all up to here is known


def solve_again(model: mujoco.MjModel, data: mujoco.MjData) -> None:
    """What `mj_forward` changes after `mj_step1`, or after itself."""
    mujoco.mj_forwardSkip(model, data, MOVED, 1)


class HardReset:
    """robosuite's forward passes between building a model and setting an init state, made again without building."""

    def __init__(self, problem: Any) -> None:
        """`problem` is LIBERO's, as built. Overwrites its data."""
        self.model, self.data = problem.sim.model._model, problem.sim.data._data
        robot = problem.robots[0]
        self.arm = robot._ref_joint_pos_indexes, robot.init_qpos  # (7,), (7,)
        self.fingers = robot._ref_gripper_joint_pos_indexes, robot.gripper.init_qpos  # (2,), (2,)
        placed = self.model.body_pos.copy(), self.model.body_quat.copy()
        self.model.body_pos[...], self.model.body_quat[...] = problem.loaded_poses
        self.warmstart = self._before_placement()
        self.model.body_pos[...], self.model.body_quat[...] = placed

    def _before_placement(self) -> np.ndarray:
        """(nv,) the solution after the model is loaded and the arm is at home: no draw has come into it yet."""
        mujoco.mj_resetData(self.model, self.data)
        mujoco.mj_forward(self.model, self.data)
        solve_again(self.model, self.data)  # as the renderer is opened
        self._set(*self.arm)
        mujoco.mj_forward(self.model, self.data)  # as the controller is built
        solve_again(self.model, self.data)  # as it reads the arm
        return self.data.qacc_warmstart.copy()

    def leave(self, objects: np.ndarray) -> None:
        """Leaves `data` as a hard reset does that placed the objects so: `objects` (nq,), but for the robot's."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = objects
        self._set(*self.arm)
        self._set(*self.fingers)
        self.data.qacc_warmstart[:] = self.warmstart
        mujoco.mj_forward(self.model, self.data)

    def _set(self, indexes: list[int], values: np.ndarray) -> None:
        self.data.qpos[indexes] = values
