"""Scripted demonstrations: what the actions are like, that they solve their tasks, and the geometry they rest on."""

from collections.abc import Iterator

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from spvla.benchmarks.libero.assets import AssetSet, resolve
from spvla.benchmarks.libero.env import LiberoEnv
from spvla.benchmarks.libero.experts import demonstrate
from spvla.benchmarks.libero.experts.clearance import lowest
from spvla.benchmarks.libero.experts.grasps import MARGIN, OPENING, TIP, grasps
from spvla.benchmarks.libero.experts.motion import DOWN
from spvla.benchmarks.libero.experts.noise import Noise
from spvla.benchmarks.libero.experts.scene import Scene, _box, _cylinder
from spvla.benchmarks.libero.starts import initial_start, settle

NONE = np.zeros((0, 3))


@pytest.fixture(scope="module")
def assets() -> AssetSet:
    return resolve()


@pytest.fixture(scope="module")
def soup(assets: AssetSet) -> Iterator[LiberoEnv]:
    with LiberoEnv("libero_object", 0, assets) as env:
        yield env


def solve(env: LiberoEnv, init_state: int, seed: int = 7) -> np.ndarray:
    found = demonstrate(env, initial_start(env, init_state), np.random.default_rng(seed))
    assert found is not None
    assert found.played is not found.actions and np.array_equal(found.played, found.actions)
    return found.actions


def replayed(env: LiberoEnv, init_state: int, actions: np.ndarray) -> list[bool]:
    env.reset(init_state)
    settle(env)
    return [env.step(action) for action in actions]


def test_the_same_seed_gives_the_same_demonstration_and_its_replay_ends_solved(soup: LiberoEnv) -> None:
    actions = solve(soup, 3)
    assert np.array_equal(actions, solve(soup, 3))
    assert not np.array_equal(actions, solve(soup, 3, seed=8))
    outcome = replayed(soup, 3, actions)
    assert outcome[-1]
    assert not outcome[0]


def test_a_disturbed_expert_still_solves_the_task_and_its_own_actions_stay_clean(soup: LiberoEnv) -> None:
    found = demonstrate(soup, initial_start(soup, 0), np.random.default_rng(7), noise=0.12)
    assert found is not None
    assert replayed(soup, 0, found.played)[-1]
    assert np.array_equal(found.played[:, 6], found.actions[:, 6])
    disturbance = found.played[:, :6] - found.actions[:, :6]
    assert 0.12 < disturbance[:, :3].std() < 0.28  # 0.2 in the long run
    assert 0.04 < disturbance[:, 3:].std() < 0.1
    assert abs(found.played).max() <= 1
    changes = np.linalg.norm(np.diff(found.actions[:, :6], axis=0), axis=1)
    assert changes.max() < 0.4  # as without disturbance: the arm's own limit


def test_noise_remembers_four_fifths_of_itself() -> None:
    ones = type("Ones", (), {"standard_normal": staticmethod(np.ones)})()
    noise = Noise(0.1, ones)
    first, second = noise(np.zeros(7, np.float32)), noise(np.array([0, 0.95, 0, 0, 0, 0, -1], np.float32))
    assert first.tolist() == pytest.approx([0.1] * 3 + [0.1 / 3] * 3 + [0])
    assert second.tolist() == pytest.approx([0.18, 1.0, 0.18] + [0.06] * 3 + [-1])


def test_actions_stay_in_range_start_gently_and_change_smoothly(soup: LiberoEnv) -> None:
    actions = solve(soup, 0)
    assert actions.dtype == np.float32
    assert actions.shape[1:] == (7,)
    assert len(actions) <= soup.max_steps
    assert abs(actions).max() <= 1
    assert set(actions[:, 6]) == {-1.0, 1.0}
    assert np.linalg.norm(np.diff(actions[:, :6], axis=0), axis=1).max() < 0.4
    assert (np.diff(actions[:, 6]) != 0).sum() == 2  # closes once, opens once
    still = np.linalg.norm(actions[:, :6], axis=1) < 1e-4
    assert still.mean() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("task", range(10))
def test_every_object_task_is_solved_from_its_first_ten_init_states(assets: AssetSet, task: int) -> None:
    with LiberoEnv("libero_object", task, assets) as env:
        starts = [initial_start(env, i) for i in range(10)]
        solved = [demonstrate(env, s, np.random.default_rng([7, task, i])) is not None for i, s in enumerate(starts)]
    assert np.mean(solved) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("task", range(10))
def test_every_spatial_task_is_solved(assets: AssetSet, task: int) -> None:
    with LiberoEnv("libero_spatial", task, assets) as env:
        starts = [initial_start(env, i) for i in range(4)]
        solved = [demonstrate(env, s, np.random.default_rng([7, task, i])) is not None for i, s in enumerate(starts)]
    assert np.mean(solved) >= 0.75


SKILLS = {
    "draw": ("libero_goal", 0),
    "push": ("libero_goal", 5),
    "turn": ("libero_goal", 7),
    "fill and shut a drawer": ("libero_10", 3),
    "two in one place": ("libero_10", 8),
    "insert, and shut a door": ("libero_10", 9),
}


@pytest.mark.parametrize(("suite", "task"), SKILLS.values(), ids=SKILLS)
def test_what_takes_more_than_pick_and_place_is_done(assets: AssetSet, suite: str, task: int) -> None:
    with LiberoEnv(suite, task, assets) as env:
        solve(env, 0)


def test_a_box_is_grasped_across_its_narrow_side_near_its_middle() -> None:
    box = _box(np.array([0.06, 0.02, 0.02])) + [0.3, 0.1, 0.02]
    best = grasps(box, NONE, ground=0.0)[0]
    closing = best.pose.rotation.as_matrix()[:, 0]
    assert abs(closing[1]) == pytest.approx(1.0)
    assert best.width == pytest.approx(0.04, abs=0.001)
    assert np.linalg.norm(best.pose.position[:2] - [0.3, 0.1]) < 0.01


def test_what_is_wider_than_the_hand_has_no_grasp_but_a_thin_rim_has() -> None:
    assert grasps(_box(np.array([0.05, 0.05, 0.03])) + [0, 0, 0.03], NONE, ground=0.0) == []
    solid = _cylinder(0.05, 0.03) + [0, 0, 0.03]
    hollow = solid[(np.linalg.norm(solid[:, :2], axis=1) > 0.045) | (solid[:, 2] < 0.003)]
    rim = grasps(hollow, NONE, ground=0.0)[0]
    assert np.linalg.norm(rim.pose.position[:2]) == pytest.approx(0.05, abs=0.01)
    assert rim.width < OPENING / 4


def test_a_wall_beside_the_thing_leaves_only_the_grasps_along_it() -> None:
    cube = _box(np.array([0.02, 0.02, 0.02])) + [0, 0, 0.02]
    wall = _box(np.array([0.1, 0.002, 0.1])) + [0, 0.035, 0.1]
    for grasp in grasps(cube, wall, ground=0.0):
        assert abs(grasp.pose.rotation.as_matrix()[1, 0]) < 0.8  # the fingers do not close towards the wall


def test_a_held_thing_comes_down_to_what_is_below_it_and_no_further() -> None:
    held = _box(np.array([0.01, 0.01, 0.03])) + [0, 0, 0.03]  # hangs from the fingers: z is down in the hand's frame
    shelf = _box(np.array([0.05, 0.05, 0.01])) + [0.4, 0, 0.19]
    low = {"held": held, "opening": 0.02, "ground": 0.0}
    above = lowest(np.array([0.4, 0.0]), DOWN, obstacles=shelf, **low)
    assert above == pytest.approx(0.20 + 0.06 + MARGIN, abs=1e-6)
    beside = lowest(np.array([0.0, 0.0]), DOWN, obstacles=shelf, **low)
    assert beside == pytest.approx(0.06 + MARGIN, abs=1e-6)
    empty = lowest(np.array([0.0, 0.0]), DOWN, obstacles=shelf, held=NONE, opening=0.0, ground=0.0)
    assert empty == pytest.approx(TIP + MARGIN, abs=1e-6)


def test_the_scene_follows_the_simulation(soup: LiberoEnv) -> None:
    soup.reset(0)
    scene = Scene(soup)
    before, cloud = scene.position, scene.cloud("alphabet_soup_1")
    for _ in range(5):
        soup.step(np.array([0, 0, 0.5, 0, 0, 0, -1]))
    assert scene.position[2] > before[2] + 0.01
    assert isinstance(scene.rotation, Rotation)
    assert abs(cloud.mean(0) - scene.where("alphabet_soup_1")).max() < 0.03
    assert scene.ground == pytest.approx(0.0, abs=0.01)
    assert not scene.holds("alphabet_soup_1")
