"""LIBERO's tasks behind the `Env` seam.

A trial of task t from init state i is the original's i-th episode of that task. Actions are LIBERO's own: six deltas
in [-1, 1] and a gripper command, -1 open, +1 closed, at 20 Hz.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mujoco
import numpy as np

from spvla.errors import UserError
from spvla.sim import stock
from spvla.sim.assets import AssetSet
from spvla.sim.init_states import load_init_states
from spvla.sim.rendering import Renderer
from spvla.types import MAX_STEPS

SUITES = tuple(MAX_STEPS)


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """One of a suite's tasks, by LIBERO's own number."""

    id: int
    name: str
    instruction: str


def tasks(suite: str) -> list[TaskInfo]:
    """Every task of a suite, in LIBERO's order."""
    if suite not in SUITES:
        raise UserError(f"suite {suite}", expected=f"one of {', '.join(SUITES)}", remedy="Correct the name.")
    names = stock.task_names()[suite]
    return [TaskInfo(id=i, name=name, instruction=_instruction(name)) for i, name in enumerate(names)]


def task_info(suite: str, task: int) -> TaskInfo:
    found = tasks(suite)
    if not 0 <= task < len(found):
        raise UserError(f"task {task} of {suite}", expected=f"0 to {len(found) - 1}", remedy="Correct the number.")
    return found[task]


def num_init_states(suite: str, task: int) -> int:
    return len(load_init_states(_init_file(suite, task)))


def _instruction(name: str) -> str:
    """LIBERO's rule: the file's name, after its scene where it has one."""
    words = name.split("_")
    scene = [i for i, word in enumerate(words) if word.startswith("SCENE")]
    return " ".join(words[scene[0] + 1 :] if scene and name[0].isupper() else words)


def _init_file(suite: str, task: int) -> Path:
    return stock.package() / "init_files" / suite / f"{task_info(suite, task).name}.pruned_init"


class LiberoEnv:
    """One task, held open over many trials."""

    def __init__(self, suite: str, task: int, assets: AssetSet, *, seed: int = 0) -> None:
        info = task_info(suite, task)
        self.suite, self.task_name, self.instruction = suite, info.name, info.instruction
        self.max_steps = MAX_STEPS[suite]
        self.init_states = load_init_states(_init_file(suite, task))
        self.seed = seed
        self.env = self._build(stock.package() / "bddl_files" / suite / f"{info.name}.bddl", assets)
        self.renderer: Renderer | None = None
        self._success = False

    @staticmethod
    def _build(bddl: Path, assets: AssetSet) -> Any:
        envs = stock.load()
        stock.use_assets(assets.path)
        import robosuite
        from libero.libero.envs.bddl_utils import get_problem_info

        return envs.TASK_MAPPING[get_problem_info(str(bddl))["problem_name"]](
            str(bddl),
            robots=["Panda"],
            controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
            initialization_noise=None,
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            ignore_done=True,
        )

    @property
    def model(self) -> mujoco.MjModel:
        return self.env.sim.model._model

    @property
    def data(self) -> mujoco.MjData:
        return self.env.sim.data._data

    def reset(self, init_state: int) -> None:
        if not 0 <= init_state < len(self.init_states):
            raise UserError(
                f"init state {init_state} of {self.task_name}",
                expected=f"0 to {len(self.init_states) - 1}",
                remedy="Ask for fewer trials a task.",
            )
        self.close_renderer()
        np.random.seed(self.seed)
        self.env.reset()
        self.env.sim.set_state_from_flattened(self.init_states[init_state])
        self.env.sim.forward()
        self.env._check_success()
        self.env._post_process()

    def step(self, action: np.ndarray) -> bool:
        return bool(self.env.step(np.asarray(action, np.float64))[2])

    def image(self, camera: str = "agentview") -> np.ndarray:
        if self.renderer is None:
            self.renderer = Renderer(self.model)
        return self.renderer.render(self.data, camera)

    def proprio(self) -> tuple[np.ndarray, np.ndarray]:
        from robosuite.utils.transform_utils import quat2axisangle

        robot, data = self.env.robots[0], self.data
        position, quat = data.site_xpos[robot.eef_site_id], data.body(robot.robot_model.eef_name).xquat[[1, 2, 3, 0]]
        gripper = data.qpos[robot._ref_gripper_joint_pos_indexes]
        state = np.concatenate([position, quat2axisangle(quat.copy()), gripper]).astype(np.float32)
        return state, data.qpos[robot._ref_joint_pos_indexes].astype(np.float32)

    def state_digest(self) -> str:
        return hashlib.sha256(self.data.qpos.tobytes() + self.data.qvel.tobytes()).hexdigest()

    def close_renderer(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None

    def close(self) -> None:
        self.close_renderer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
