"""LIBERO's HDF5 demonstrations: reading, the no-op filter, the replay."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from fakes import FakeEnv

from spvla.data.demos import count_demos, demo_files, drop_noops, read_demo, replay
from spvla.data.spool import Spool
from spvla.errors import DatasetError
from spvla.policies.openvla.images import decode_jpeg
from spvla.types import Episode


def write_demos(file: Path, demos: list[np.ndarray], state: np.ndarray | None = None) -> Path:
    """An HDF5 file in LIBERO's layout: data/demo_N/{actions, states}."""
    with h5py.File(file, "w") as opened:
        for number, actions in enumerate(demos):
            group = opened.create_group(f"data/demo_{number}")
            group["actions"] = actions
            first = np.zeros(5) if state is None else state
            group["states"] = np.tile(first, (len(actions), 1))
    return file


def moves(*speeds: float, gripper: float = -1.0) -> np.ndarray:
    return np.array([[speed, 0, 0, 0, 0, 0, gripper] for speed in speeds])


def test_steps_that_ask_nothing_of_the_arm_are_dropped() -> None:
    assert drop_noops(moves(0.5, 0.0, 5e-5, 0.2))[:, 0].tolist() == [0.5, 0.2]


def test_a_still_step_that_moves_the_gripper_is_kept_once() -> None:
    actions = np.concatenate([moves(0.5), moves(0.0, 0.0, gripper=1.0)])
    assert drop_noops(actions)[:, 6].tolist() == [-1.0, 1.0]


def test_the_gripper_is_compared_with_the_last_kept_step_not_the_last_step() -> None:
    actions = np.concatenate([moves(0.0, gripper=1.0), moves(0.5), moves(0.0), moves(0.0, gripper=1.0)])
    assert drop_noops(actions)[:, 6].tolist() == [-1.0, 1.0]  # the first step goes by its norm alone


def test_only_no_ops_leave_nothing() -> None:
    assert drop_noops(moves(0.0, 0.0)).shape == (0, 7)


def test_a_replay_is_kept_when_its_last_step_succeeds() -> None:
    env = FakeEnv(goal=1.0)
    env.reset(0)
    episode = replay(env, moves(0.5, 0.4, 0.3), source="here")
    assert episode is not None
    assert (len(episode.images), len(episode.wrist_images), episode.states.shape) == (3, 3, (3, 8))
    assert episode.states[:, 0].tolist() == pytest.approx([0.0, 0.5, 0.9])  # before each action, not after
    assert decode_jpeg(episode.images[1]).shape == (256, 256, 3)
    assert (episode.actions.dtype, episode.instruction, episode.source) == (np.float32, "move right", "here")


def test_a_replay_that_passes_its_goal_and_ends_elsewhere_is_not_kept() -> None:
    env = FakeEnv(goal=1.0)
    env.reset(0)
    assert replay(env, moves(1.2, -0.5), source="here") is None


def test_demonstrations_are_read_by_number(tmp_path: Path) -> None:
    file = write_demos(tmp_path / "a_demo.hdf5", [moves(0.1), moves(0.2, 0.3)], state=np.arange(5.0))
    assert count_demos(file) == 2
    demo = read_demo(file, 1)
    assert (demo.actions[:, 0].tolist(), demo.state.tolist()) == ([0.2, 0.3], [0, 1, 2, 3, 4])
    assert demo.source == "a_demo.hdf5#demo_1"


def test_gaps_between_numbers_lose_no_demonstration(tmp_path: Path) -> None:
    file = write_demos(tmp_path / "a_demo.hdf5", [moves(0.1 * n) for n in range(1, 13)])
    with h5py.File(file, "a") as opened:
        for number in (2, 5, 6, 8):
            del opened[f"data/demo_{number}"]
        opened.create_group("data/mask")
    read = [read_demo(file, k) for k in range(count_demos(file))]
    assert [demo.source.split("_")[-1] for demo in read] == ["0", "1", "3", "4", "7", "9", "10", "11"]
    assert [round(10 * float(demo.actions[0, 0])) for demo in read] == [1, 2, 4, 5, 8, 10, 11, 12]


def test_a_folder_without_the_suites_files_is_refused(tmp_path: Path) -> None:
    write_demos(tmp_path / "other_demo.hdf5", [moves(0.1)])
    with pytest.raises(DatasetError, match="holds none of the suite's demonstrations"):
        demo_files(tmp_path, ["pick_up_the_milk"])


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = write_demos(tmp_path / "a_demo.hdf5", [moves(*np.ones(5000))])
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DatasetError, match="no HDF5 file, or a truncated one"):
        count_demos(file)


@pytest.mark.parametrize("actions", [np.ones((3, 6)), np.full((3, 7), np.nan)])
def test_actions_of_another_form_are_refused(tmp_path: Path, actions: np.ndarray) -> None:
    with pytest.raises(DatasetError, match="demo_0 has actions"):
        read_demo(write_demos(tmp_path / "a_demo.hdf5", [actions]), 0)


def test_a_spooled_episode_comes_back_equal_and_a_failure_is_remembered(tmp_path: Path) -> None:
    env = FakeEnv(goal=0.1)
    env.reset(0)
    episode = replay(env, moves(0.2, 0.3), source="here")
    assert isinstance(episode, Episode)
    spool = Spool(tmp_path / "takes")
    spool.put(3, 12, episode)
    spool.put(3, 13, None)
    (tmp_path / "takes" / ".task_03_take_0014.npz").write_bytes(b"cut short")
    assert spool.takes() == {(3, 12): True, (3, 13): False}
    back = spool.read(spool.name(3, 12))
    assert (back.images, back.wrist_images) == (episode.images, episode.wrist_images)
    assert (back.instruction, back.source) == (episode.instruction, episode.source)
    assert np.array_equal(back.actions, episode.actions)
    assert np.array_equal(back.states, episode.states)
