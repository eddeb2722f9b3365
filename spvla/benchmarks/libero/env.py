"""LIBERO's tasks behind the `Env` seam.

A trial of task t from init state i is the original's i-th episode of that task. Actions are LIBERO's own: six deltas
in [-1, 1] and a gripper command, -1 open, +1 closed, at 20 Hz.
"""

import hashlib
from types import TracebackType
from typing import Any, Self

import mujoco
import numpy as np

from spvla.benchmarks.libero import stock
from spvla.benchmarks.libero.assets import AssetSet
from spvla.benchmarks.libero.controller import Controller
from spvla.benchmarks.libero.init_states import load_init_states, num_init_states
from spvla.benchmarks.libero.placements import Placements, Start
from spvla.benchmarks.libero.sampling import Sample, SensorClock, View
from spvla.benchmarks.libero.suites import SUITES, TaskInfo, task_info, tasks
from spvla.benchmarks.libero.warmstart import HardReset, solve_again
from spvla.errors import UserError
from spvla.render.rendering import Renderer
from spvla.types import ACTION_DIM

__all__ = ["SUITES", "LiberoEnv", "TaskInfo", "num_init_states", "task_info", "tasks"]

SUBSTEPS = 25  # 500 Hz physics, 20 Hz actions


class LiberoEnv:
    """One task, held open over many trials.

    `env` is LIBERO's own problem object and `model`, `data` are MuJoCo's, for experts and success checks; a policy
    gets `image` and `proprio`, which show the moment that LIBERO's sensors last sampled. spare_gpu: see `Renderer`.
    """

    def __init__(
        self,
        suite: str,
        task: int,
        assets: AssetSet,
        *,
        seed: int = 0,
        spare_gpu: bool = False,
        info: TaskInfo | None = None,  # of a task that another benchmark makes of LIBERO's parts
    ) -> None:
        info = info or task_info(suite, task)
        self.suite, self.task, self.task_name, self.instruction = suite, task, info.name, info.instruction
        self.max_steps = info.max_steps
        self.init_states = load_init_states(info.init_file)
        self.env = stock.build_problem(info.bddl_file, assets.path)
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self.robot = self.env.robots[0]
        self.controller = Controller(self.robot, self.model, self.data)
        self.placements = Placements(self.env, seed=seed)
        self.hard_reset = HardReset(self.env)
        self.clock = SensorClock()
        self.sample = Sample(self.model, self.data)
        self.renderer: Renderer | None = None
        self.spare_gpu = spare_gpu
        self.env.visualize({part: False for part in self.env._visualizations})
        self._body_pos, self._body_quat = self.model.body_pos.copy(), self.model.body_quat.copy()
        self._site_rgba = self.model.site_rgba.copy()
        self._lights = [thing.object_properties["vis_site_names"] for thing in self._things()]
        self._lights_off = [dict(names) for names in self._lights]

    def reset(self, init_state: int) -> None:
        if not 0 <= init_state < len(self.init_states):
            raise UserError(
                f"init state {init_state} of {self.suite} task {self.task}",
                expected=f"0 to {len(self.init_states) - 1}",
                remedy="Ask for fewer trials a task.",
            )
        self.reset_to(self.init_states[init_state], episode=init_state)

    def reset_to(self, state: np.ndarray, *, episode: int) -> None:
        """Any state (1 + nq + nv,) of this task, in the world of its `episode`-th episode."""
        self.begin(Start(state=state, placement=self.placements.episode(episode)))

    def begin(self, start: Start) -> None:
        """Puts the world where `start` says, whatever ran before."""
        self._restore_model()
        for pose in start.placement.fixtures:
            self.model.body_pos[pose.body], self.model.body_quat[pose.body] = pose.position, pose.quaternion
        self.hard_reset.leave(start.placement.objects)
        self._set_state(start.state)

    def step(self, action: np.ndarray) -> bool:
        action = np.asarray(action, np.float64)
        assert action.shape == (ACTION_DIM,)
        model, data, controller = self.model, self.data, self.controller
        for substep in range(SUBSTEPS):
            mujoco.mj_step1(model, data)
            solve_again(model, data)
            if substep == 0:
                controller.set_goal(action)
            controller.actuate()
            mujoco.mj_step2(model, data)
            if self.clock.tick():
                self.sample.take()
        self.env._post_process()
        return bool(self.env._check_success())

    def image(self, camera: str = "agentview") -> np.ndarray:
        if self.renderer is None:
            self.renderer = Renderer(self.model, spare_gpu=self.spare_gpu)
        with self.sample.colours():
            return self.renderer.render(self.sample.data, camera)

    def moment(self) -> View:
        return self.sample.keep()

    def image_at(self, moment: object, camera: str = "agentview") -> np.ndarray:
        assert isinstance(moment, View)
        now = self.sample.keep()
        self.sample.show(moment)
        try:
            return self.image(camera)
        finally:
            self.sample.show(now)

    def proprio(self) -> tuple[np.ndarray, np.ndarray]:
        robot, data = self.robot, self.sample.data
        hand = self.model.body(robot.robot_model.eef_name).id
        rotation = stock.quat2axisangle(data.xquat[hand][[1, 2, 3, 0]])
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        state = np.concatenate([data.site_xpos[robot.eef_site_id], rotation, fingers])
        return state.astype(np.float32), data.qpos[robot._ref_joint_pos_indexes].astype(np.float32)

    def state_digest(self) -> str:
        return hashlib.sha256(self.data.qpos.tobytes() + self.data.qvel.tobytes()).hexdigest()

    def close(self) -> None:
        """Silent, and may be repeated."""
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None

    def _things(self) -> list[Any]:
        return [*self.env.objects_dict.values(), *self.env.fixtures_dict.values()]

    def _restore_model(self) -> None:
        """Undoes all that placements and lit burners changed."""
        self.model.body_pos[...], self.model.body_quat[...] = self._body_pos, self._body_quat
        self.model.site_rgba[...] = self._site_rgba
        for names, off in zip(self._lights, self._lights_off, strict=True):
            names.update(off)

    def _set_state(self, state: np.ndarray) -> None:
        """`state`: (1 + nq + nv,) time, qpos, qvel. Everything else is as a hard reset left it."""
        nq = self.model.nq
        self.data.time, self.data.qpos[:], self.data.qvel[:] = state[0], state[1 : 1 + nq], state[1 + nq :]
        mujoco.mj_forward(self.model, self.data)
        self.controller.reset()
        self.env._check_success()
        self.env._post_process()
        self.clock.reset()
        self.sample.take()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
