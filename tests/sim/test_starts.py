"""Drawn starts: what LIBERO's resets give, decided by seed, task and take; and films that nothing is simulated for."""

from collections.abc import Iterator

import numpy as np
import pytest

from spvla.benchmarks.libero.assets import AssetSet, resolve
from spvla.benchmarks.libero.env import LiberoEnv
from spvla.benchmarks.libero.experts import demonstrate
from spvla.benchmarks.libero.recorders import Demonstrator, filmed, is_noisy, without_noops
from spvla.benchmarks.libero.starts import JOINT_NOISE, as_described, drawn_start, initial_start, settle, strayed
from spvla.data.demos import replay

ON_OR_IN = (3, 4, 5, 7, 9)  # tasks of libero_spatial whose bowl begins on or in something else


@pytest.fixture(scope="module")
def assets() -> AssetSet:
    return resolve()


@pytest.fixture(scope="module")
def drawer(assets: AssetSet) -> Iterator[LiberoEnv]:
    """libero_spatial task 4: a bowl in an open drawer, another on the cabinet."""
    with LiberoEnv("libero_spatial", 4, assets) as env:
        yield env


def qpos(env: LiberoEnv, states: np.ndarray) -> np.ndarray:
    return states[..., 1 : 1 + env.model.nq]


def test_seed_and_take_decide_a_start_whatever_ran_before(drawer: LiberoEnv, assets: AssetSet) -> None:
    first = drawn_start(drawer, seed=7, take=3)
    drawn_start(drawer, seed=8, take=0)
    drawer.reset(5)
    again = drawn_start(drawer, seed=7, take=3)
    assert np.array_equal(first.state, again.state)
    assert not np.array_equal(first.state, drawn_start(drawer, seed=7, take=4).state)
    assert not np.array_equal(first.state, drawn_start(drawer, seed=8, take=3).state)
    with LiberoEnv("libero_spatial", 4, assets) as other:
        elsewhere = drawn_start(other, seed=7, take=3)
        assert np.array_equal(first.state, elsewhere.state)
        for ours, theirs in zip(first.placement.fixtures, elsewhere.placement.fixtures, strict=True):
            assert ours.body == theirs.body and ours.position == theirs.position


def test_drawing_leaves_the_trials_of_an_evaluation_as_they_are(drawer: LiberoEnv, assets: AssetSet) -> None:
    drawn_start(drawer, seed=1, take=1)
    drawer.reset(2)
    settle(drawer)
    with LiberoEnv("libero_spatial", 4, assets) as fresh:
        fresh.reset(2)
        settle(fresh)
        assert fresh.state_digest() == drawer.state_digest()


@pytest.mark.parametrize("task", ON_OR_IN)
def test_what_begins_on_or_in_something_else_is_drawn_there(assets: AssetSet, task: int) -> None:
    with LiberoEnv("libero_spatial", task, assets) as env:
        drawn = np.array([drawn_start(env, seed=0, take=k).state for k in range(6)])
        assert as_described(env)  # of the last one, settled
        at = [env.model.joint(thing.joints[-1]).qposadr[0] for thing in env.env.objects_dict.values()]
        flat = [i for k in at for i in (k, k + 1)]  # x and y; heights depend on the assets
        ours, theirs = qpos(env, drawn)[:, flat], qpos(env, env.init_states)[:, flat]
        assert abs(ours - theirs.mean(0)).max() < 0.06  # m; regions are up to 0.05 wide, furniture's poses add 0.02
        assert abs(ours.mean(0) - theirs.mean(0)).max() < 0.025


def test_the_arms_joints_differ_from_rest_as_in_init_states(drawer: LiberoEnv) -> None:
    rest = drawer.robot.init_qpos
    drawn = np.array([qpos(drawer, drawn_start(drawer, seed=2, take=k).state)[:7] for k in range(12)]) - rest
    assert drawn.std() == pytest.approx(JOINT_NOISE, rel=0.3)
    assert (qpos(drawer, drawer.init_states)[:, :7] - rest).std() == pytest.approx(JOINT_NOISE, rel=0.1)
    assert not np.isin(drawn, qpos(drawer, drawer.init_states)[:, :7] - rest).any()


def test_a_start_that_is_not_what_the_task_describes_does_not_count(drawer: LiberoEnv) -> None:
    start = initial_start(drawer, 0)
    drawer.begin(start)
    settle(drawer)
    assert as_described(drawer) and not strayed(drawer, start)
    bowl = drawer.model.joint("akita_black_bowl_1_joint0").qposadr[0]
    start.state[1 + bowl : 4 + bowl] += [-0.1, 0.3, 0.1]  # out of the drawer, above the table
    drawer.begin(start)
    settle(drawer)
    assert not as_described(drawer)
    start.state[1 + bowl : 4 + bowl] += [0.9, 0.0, 0.0]  # beyond the table's edge
    drawer.begin(start)
    for _ in range(3):
        settle(drawer)
    assert not strayed(drawer, start)  # it falls straight down, which the description notices
    assert not as_described(drawer)


def test_a_film_shows_what_a_replay_of_the_same_actions_shows(assets: AssetSet) -> None:
    with LiberoEnv("libero_goal", 7, assets) as env:  # a stove, whose burner glows in the end
        start = drawn_start(env, seed=3, take=0)
        found = demonstrate(env, start, np.random.default_rng(3))
        assert found is not None
        kept = without_noops(env, start, found)
        assert kept is not None
        film = filmed(env, kept, source="here")
        env.begin(start)
        settle(env)
        replayed = replay(env, kept.actions, source="here")
    assert replayed is not None
    assert film.images[-1] == replayed.images[-1]
    assert film.images == replayed.images and film.wrist_images == replayed.wrist_images
    assert np.array_equal(film.states, replayed.states) and np.array_equal(film.joint_states, replayed.joint_states)
    assert np.array_equal(film.actions, replayed.actions)


def test_the_share_of_disturbed_takes_is_kept_from_the_first_take_on() -> None:
    noisy = [is_noisy(take, 0.6) for take in range(100)]
    assert sum(noisy) == 60 and sum(noisy[:10]) == 6 and sum(noisy[:5]) == 3
    assert not any(is_noisy(take, 0.0) for take in range(20)) and all(is_noisy(take, 1.0) for take in range(20))


def test_a_demonstrator_says_where_it_began_and_how_much_it_was_disturbed(assets: AssetSet) -> None:
    recorder = Demonstrator(assets, seed=7, test_starts=True, noise=0.1, noise_share=0.5)
    with recorder.open("libero_object", 9) as env:
        assert recorder.start(env, 52)[1] == "init state 2"
        assert np.array_equal(recorder.start(env, 52)[0].state, env.init_states[2])
