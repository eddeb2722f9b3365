"""Ours against LIBERO's own environment: states, pictures and success, to the bit, whatever ran before."""

import numpy as np
import pytest
from stock_parts import differences, our_trial, rummage, stock_env, stock_trial

from spvla.benchmarks.libero.assets import AssetSet, resolve
from spvla.benchmarks.libero.env import LiberoEnv

STEPS = 62


@pytest.fixture(scope="module")
def assets() -> AssetSet:
    return resolve()


def assert_equal_to_stock(suite: str, task: int, assets: AssetSet, camera: str = "agentview") -> None:
    """The first episode of a task, with the hand among the objects."""
    with LiberoEnv(suite, task, assets) as env, stock_env(suite, task, assets, [camera]) as theirs:
        actions, touched = rummage(env, 0, STEPS)
        assert touched >= 10, "a comparison without contacts says little"
        theirs.reset()
        expected = stock_trial(theirs, env.init_states[0], actions, camera)
        assert differences(our_trial(env, 0, actions, camera), expected) == []


def assert_any_history_gives_the_same(suite: str, task: int, assets: AssetSet, trials: list[int], steps: int) -> None:
    """`trials` in the given order in ours, against LIBERO's own episodes 0, 1, 2, ... in turn."""
    with LiberoEnv(suite, task, assets) as env, stock_env(suite, task, assets) as theirs:
        actions = {trial: rummage(env, trial, steps)[0] for trial in trials}
        expected = {}
        for trial in range(max(trials) + 1):
            theirs.reset()
            if trial in trials:
                expected[trial] = stock_trial(theirs, env.init_states[trial], actions[trial])
        for trial in trials:
            assert differences(our_trial(env, trial, actions[trial]), expected[trial]) == [], f"trial {trial}"


def test_every_step_of_an_episode_is_the_originals_to_the_bit(assets: AssetSet) -> None:
    assert_equal_to_stock("libero_goal", 7, assets)  # a stove, whose burner lights up


def test_a_trial_is_the_same_whatever_ran_before_it(assets: AssetSet) -> None:
    assert_any_history_gives_the_same("libero_spatial", 4, assets, [1, 0], 12)  # a bowl in a drawer


def test_the_furniture_stands_elsewhere_in_each_episode(assets: AssetSet) -> None:
    """The hidden state itself: without it, the tests above could pass by standing still."""
    with LiberoEnv("libero_spatial", 0, assets) as env:
        poses = [np.array([p.position for p in env.placements.episode(i).fixtures]) for i in range(3)]
    assert all(len(p) >= 2 for p in poses)  # cabinet and stove
    assert 1e-4 < np.abs(poses[0] - poses[1]).max() < 0.03  # metres
    assert not np.array_equal(poses[1], poses[2])


def test_replaying_the_draws_leaves_numpys_generator_alone(assets: AssetSet) -> None:
    with LiberoEnv("libero_object", 0, assets) as env:
        np.random.seed(5)
        expected = np.random.RandomState(5).uniform(size=3)
        env.reset(3)
        assert np.array_equal(np.random.uniform(size=3), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task"),
    [
        ("libero_spatial", 0), ("libero_spatial", 9), ("libero_object", 2), ("libero_object", 7),
        ("libero_goal", 3), ("libero_goal", 9), ("libero_10", 2), ("libero_10", 9),
    ],
)  # fmt: skip
def test_two_tasks_of_each_suite_are_the_originals_to_the_bit(suite: str, task: int, assets: AssetSet) -> None:
    assert_equal_to_stock(suite, task, assets)


@pytest.mark.slow
def test_the_wrist_camera_is_the_originals_to_the_bit(assets: AssetSet) -> None:
    assert_equal_to_stock("libero_object", 0, assets, "robot0_eye_in_hand")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("suite", "task"), [("libero_spatial", 4), ("libero_object", 5), ("libero_goal", 1), ("libero_10", 3)]
)
def test_trials_in_any_order_are_the_originals_episodes(suite: str, task: int, assets: AssetSet) -> None:
    assert_any_history_gives_the_same(suite, task, assets, [7, 49, 0, 1], 25)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_assets_are_the_originals_to_the_bit(real_assets: AssetSet) -> None:
    assert_equal_to_stock("libero_10", 3, real_assets)
    assert_any_history_gives_the_same("libero_spatial", 4, real_assets, [7, 0], 25)
