"""Demonstrations on their way into a data set: LIBERO's HDF5 files, the no-op filter, the replay that takes pictures.

Replaying drops steps in which nothing was asked of the arm, renders both cameras anew at 256 x 256, and keeps a
demonstration only if its last step still solves the task, as OpenVLA's LIBERO data sets were made.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from spvla.errors import DatasetError
from spvla.policies.openvla.images import encode_jpeg
from spvla.types import ACTION_DIM, Env, Episode

CAMERAS = ("agentview", "robot0_eye_in_hand")
STILL = 1e-4  # norm of the six arm actions below which nothing was asked
SUFFIX = "_demo.hdf5"
_DEMO = re.compile(r"demo_\d+")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """One recorded demonstration: where the world stood, and what was then done."""

    state: np.ndarray  # (S,) float64: time, qpos, qvel before the first action
    actions: np.ndarray  # (T, 7) float64, gripper -1 open, +1 closed
    source: str


def demo_files(folder: Path, task_names: list[str]) -> dict[int, Path]:
    """Task number -> its HDF5 file, of those that are there. Raises DatasetError when none is."""
    found = {i: folder / f"{name}{SUFFIX}" for i, name in enumerate(task_names)}
    found = {i: file for i, file in found.items() if file.is_file()}
    if not found:
        raise DatasetError(
            f"--demos {folder} holds none of the suite's demonstrations",
            expected=f"files such as {task_names[0]}{SUFFIX}",
            remedy="Give the folder of LIBERO's HDF5 files of this suite, or another --task_suite_name.",
        )
    return found


def count_demos(file: Path) -> int:
    with _open(file) as opened:
        return len(_demos(opened, file))


def read_demo(file: Path, index: int) -> Demo:
    """The `index`-th demonstration that a file holds, in the order of their numbers, which may have gaps.

    Raises DatasetError for one that is not LIBERO's.
    """
    with _open(file) as opened:
        name, demo = _demos(opened, file)[index]
        if not isinstance(demo, h5py.Group) or not {"actions", "states"} <= set(demo):
            raise _broken(file, f"{name} has no actions and states")
        actions, states = np.asarray(demo["actions"], np.float64), np.asarray(demo["states"], np.float64)
    if actions.ndim != 2 or actions.shape[1] != ACTION_DIM or len(states) < 1 or not np.isfinite(actions).all():
        raise _broken(file, f"{name} has actions of shape {actions.shape}")
    return Demo(state=states[0], actions=actions, source=f"{file.name}#{name}")


def asking(actions: np.ndarray) -> np.ndarray:
    """(T, 7) -> (T,) bool: the steps that ask something of the arm or differ from the last such step's gripper command.

    The first step is none if it asks nothing of the arm, whatever its gripper command.
    """
    found, gripper = np.zeros(len(actions), bool), None
    for t, action in enumerate(actions):
        still = np.linalg.norm(action[:6]) < STILL
        if not still or (gripper is not None and action[6] != gripper):
            found[t], gripper = True, action[6]
    return found


def drop_noops(actions: np.ndarray) -> np.ndarray:
    """(T, 7) -> (T', 7): the steps that are `asking`."""
    return actions[asking(actions)]


class Film:
    """What an environment shows before each step of an episode."""

    def __init__(self) -> None:
        self.images: dict[str, list[bytes]] = {camera: [] for camera in CAMERAS}
        self.states: list[np.ndarray] = []
        self.joint_states: list[np.ndarray] = []

    def take(self, env: Env) -> None:
        for camera, frames in self.images.items():
            frames.append(encode_jpeg(np.ascontiguousarray(env.image(camera)[::-1, ::-1])))
        state, joints = env.proprio()
        self.states.append(state)
        self.joint_states.append(joints)

    def episode(self, actions: np.ndarray, *, instruction: str, source: str) -> Episode:
        """`actions`: (T, 7), one for each time that this was taken."""
        return Episode(
            images=self.images[CAMERAS[0]],
            wrist_images=self.images[CAMERAS[1]],
            states=np.array(self.states),
            joint_states=np.array(self.joint_states),
            actions=actions.astype(np.float32),
            instruction=instruction,
            source=source,
        )


def replay(env: Env, actions: np.ndarray, *, source: str) -> Episode | None:
    """Films the (T, 7) actions from where the world stands; None unless the last one solves the task."""
    film, solved = Film(), False
    for action in actions:
        film.take(env)
        solved = env.step(action)
    return film.episode(actions, instruction=env.instruction, source=source) if solved else None


def _open(file: Path) -> h5py.File:
    try:
        return h5py.File(file, "r")
    except OSError as e:
        raise _broken(file, "no HDF5 file, or a truncated one") from e


def _demos(opened: h5py.File, file: Path) -> list[tuple[str, Any]]:
    """(name, group) of each data/demo_N, by N."""
    data = opened.get("data")
    if not isinstance(data, h5py.Group):
        raise _broken(file, "no group 'data'")
    numbers = {int(name.removeprefix("demo_")): name for name in data if _DEMO.fullmatch(name)}
    return [(numbers[number], data[numbers[number]]) for number in sorted(numbers)]


def _broken(file: Path, what: str) -> DatasetError:
    return DatasetError(
        f"{file}: {what}",
        expected="LIBERO's layout, data/demo_N/{actions, states}",
        remedy="Download the file again, or move it out of the folder.",
    )
