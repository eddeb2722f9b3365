"""The Panda's operational space controller and gripper at 500 Hz, equal to the bit to robosuite's OSC_POSE.

    torques = J^T (Lambda F) + gravity + nullspace,   F = kp (goal - pose) - kd velocity
    (Khatib 1987, khatib.stanford.edu/publications/pdfs/Khatib_1987_RA.pdf)

robosuite spends most of its time around these lines: two extra `mj_forward` a substep, look-ups by name, fresh arrays.
Here the buffers stay, in robosuite's memory layouts, and every product goes through the same routine (numpy's or
numba's) as there, because another BLAS kernel rounds differently.
"""

from typing import Any

import mujoco
import numpy as np

from spvla.benchmarks.libero.stock import nullspace_torques, opspace_matrices, orientation_error, set_goal_orientation
from spvla.benchmarks.libero.warmstart import solve_again

ARM = 7  # joints
GRIPPER_SPEED = 0.01  # of the range [-1, 1], a substep


class Controller:
    """Turns one 20 Hz action into joint torques and finger positions for each 500 Hz substep."""

    def __init__(self, robot: Any, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        """`robot` is robosuite's, fresh from building the problem: its controller is what a hard reset leaves."""
        self.model, self.data = model, data
        stock = robot.controller
        self.site = model.site(stock.eef_name).id
        self.joints = _slice(robot._ref_joint_pos_indexes)
        self.dofs = _slice(robot._ref_joint_vel_indexes)
        self.motors = _slice(robot._ref_joint_actuator_indexes)
        self.fingers = _slice(robot._ref_joint_gripper_actuator_indexes)
        self.kp, self.kd = stock.kp, stock.kd  # (6,)
        self.scale = (stock.output_max - stock.output_min) / (stock.input_max - stock.input_min)
        self.low, self.high = (limit.copy() for limit in robot.torque_limits)
        low, high = model.actuator_ctrlrange[self.fingers].T
        self.finger_centre, self.finger_reach = 0.5 * (high + low), 0.5 * (high - low)

        self.position, self.rotation = stock.ee_pos.copy(), stock.ee_ori_mat.copy()  # (3,), (3, 3)
        self.velocity = np.concatenate([stock.ee_pos_vel, stock.ee_ori_vel])  # (6,) linear, angular
        self.q, self.dq = stock.joint_pos.copy(), stock.joint_vel.copy()  # (7,)
        self.jacobian = np.asfortranarray(stock.J_full)  # (6, 7)
        self.linear, self.angular = np.asfortranarray(stock.J_pos), np.asfortranarray(stock.J_ori)  # (3, 7)
        self.inertia = np.asfortranarray(stock.mass_matrix)  # (7, 7)
        self.home = stock.initial_joint.copy()  # (7,) the nullspace pulls towards it
        self._state = ("position", "rotation", "velocity", "q", "dq", "jacobian", "linear", "angular", "inertia")
        self._fresh = {name: getattr(self, name).copy(order="K") for name in self._state}
        self._full_linear, self._full_angular = np.zeros((2, 3, model.nv))
        self._full_inertia = np.zeros((model.nv, model.nv))
        self._error = np.zeros(6)
        self.reset()

    def reset(self) -> None:
        """As after a hard reset: robosuite then acts on the pose it had *before* the init state was set, for one
        substep, and so does this."""
        for name, value in self._fresh.items():
            getattr(self, name)[...] = value
        self.goal_position, self.goal_rotation = self.position.copy(), self.rotation.copy()
        self.grip = np.zeros(2)
        self.current = True

    def set_goal(self, action: np.ndarray) -> None:
        """Takes an action (7,): position and axis-angle deltas and the gripper. Call after `mj_step1`."""
        self._update()
        delta = np.clip(action[:6], -1, 1) * self.scale + 0.0  # no -0.0
        if any(delta[3:] != 0.0):  # else the last goal stands
            self.goal_rotation = set_goal_orientation(delta[3:], self.rotation)
        self.goal_position = self.position + delta[:3]
        self.grip_step = np.array([-1.0, 1.0]) * GRIPPER_SPEED * np.sign(action[6:])

    def actuate(self) -> None:
        """Writes `data.ctrl` for one substep. Call after `mj_step1`."""
        self._update()
        np.subtract(self.goal_position, self.position, out=self._error[:3])
        self._error[3:] = orientation_error(self.goal_rotation, self.rotation)
        wrench = self._error * self.kp + -self.velocity * self.kd
        _, linear, angular, nullspace = opspace_matrices(self.inertia, self.jacobian, self.linear, self.angular)
        wrench = np.concatenate([np.dot(linear, wrench[:3]), np.dot(angular, wrench[3:])])
        torques = np.dot(self.jacobian.T, wrench) + self.data.qfrc_bias[self.dofs]
        torques += nullspace_torques(self.inertia, nullspace, self.home, self.q, self.dq)
        ctrl = self.data.ctrl
        np.clip(torques, self.low, self.high, out=ctrl[self.motors])
        self.grip = np.clip(self.grip + self.grip_step, -1.0, 1.0)
        ctrl[self.fingers] = self.finger_centre + self.finger_reach * self.grip
        self.current = False

    def _update(self) -> None:
        """Reads the arm's state, once a substep."""
        if self.current:
            return
        self.current = True
        model, data = self.model, self.data
        solve_again(model, data)
        self.position[:] = data.site_xpos[self.site]
        self.rotation.ravel()[:] = data.site_xmat[self.site]
        mujoco.mj_jacSite(model, data, self._full_linear, self._full_angular, self.site)
        np.dot(self._full_linear, data.qvel, out=self.velocity[:3])
        np.dot(self._full_angular, data.qvel, out=self.velocity[3:])
        self.q[:] = data.qpos[self.joints]
        self.dq[:] = data.qvel[self.dofs]
        self.linear[...] = self.jacobian[:3] = self._full_linear[:, self.dofs]
        self.angular[...] = self.jacobian[3:] = self._full_angular[:, self.dofs]
        mujoco.mj_fullM(model, self._full_inertia, data.qM)
        self.inertia[...] = self._full_inertia[self.dofs, self.dofs]


def _slice(indexes: list[int]) -> slice:
    first = int(indexes[0])
    assert [int(i) for i in indexes] == list(range(first, first + len(indexes)))
    return slice(first, first + len(indexes))
