"""The protocol of one trial, played on the fake world of one number."""

import numpy as np
import pytest
from fakes import FakeEnv

from spvla.errors import InfrastructureError, UserError
from spvla.eval.episode import run_trial
from spvla.types import Outcome, Status, Trial

TRIAL = Trial(policy="p", suite="libero_object", task=3, init_state=0)


def play(env: FakeEnv, act: object, *, wait: int = 2, limit: int = 20, **options: object) -> Outcome:
    return run_trial(env, act, TRIAL, num_steps_wait=wait, center_crop=False, max_steps=limit, **options)


def constant(*values: float):
    return lambda image, instruction: np.array(values, np.float64)


RIGHT = constant(0.25, 0, 0, 0, 0, 0, 1)


class Recorder(FakeEnv):
    """Keeps what it was asked to do."""

    def __init__(self, goal: float = 1.0) -> None:
        super().__init__(goal)
        self.actions: list[np.ndarray] = []

    def step(self, action: np.ndarray) -> bool:
        self.actions.append(np.array(action))
        return super().step(action)


def test_success_ends_the_trial_at_the_step_that_brought_it() -> None:
    outcome = play(Recorder(goal=0.9), RIGHT)
    assert (outcome.status, outcome.steps, outcome.note) == (Status.SUCCESS, 4, "")  # 0.25, 0.5, 0.75, 1.0


def test_the_limit_ends_a_trial_as_failure() -> None:
    outcome = play(Recorder(goal=100), RIGHT, limit=7)
    assert (outcome.status, outcome.steps) == (Status.FAILURE, 7)


def test_the_world_settles_with_an_open_gripper_before_the_policy_acts() -> None:
    env = Recorder(goal=0.9)
    play(env, RIGHT, wait=10)
    assert np.array_equal(env.actions[:10], [[0, 0, 0, 0, 0, 0, -1]] * 10)
    assert len(env.actions) == 14


def test_success_while_settling_does_not_count() -> None:
    class Done(Recorder):
        def step(self, action: np.ndarray) -> bool:
            super().step(action)
            return len(self.actions) <= 2

    assert play(Done(), RIGHT, wait=2, limit=3).status is Status.FAILURE


def test_the_gripper_is_turned_to_the_environments_sign() -> None:
    env = Recorder(goal=100)
    play(env, constant(0, 0, 0, 0, 0, 0, 1.0), wait=0, limit=1)  # 1: open, as in the data
    play(env, constant(0, 0, 0, 0, 0, 0, 0.0), wait=0, limit=1)
    assert [a[6] for a in env.actions] == [-1, 1]


@pytest.mark.parametrize(
    ("action", "note"),
    [
        ((np.nan, 0, 0, 0, 0, 0, 0), "NaN action at step 0"),
        ((np.inf, 0, 0, 0, 0, 0, 0), "infinite action at step 0"),
        ((0, 0, 0), "action of shape (3,) at step 0"),
    ],
)
def test_a_broken_action_is_the_policys_failure_and_never_reaches_the_world(action: tuple, note: str) -> None:
    env = Recorder()
    outcome = play(env, constant(*action), wait=0)
    assert (outcome.status, outcome.steps, outcome.note, env.actions) == (Status.FAILURE, 0, note, [])


def test_a_crash_of_the_world_is_no_failure_of_the_policy() -> None:
    class Broken(Recorder):
        def step(self, action: np.ndarray) -> bool:
            if len(self.actions) == 5:
                raise RuntimeError("mj_step: out of memory")
            return super().step(action)

    where = r"libero_object task 3, init state 0, step 3: RuntimeError: mj_step: out of memory"
    with pytest.raises(InfrastructureError, match=where):
        play(Broken(goal=100), RIGHT, wait=2)


def test_a_crash_of_the_policys_server_is_no_failure_of_the_policy() -> None:
    def act(image: np.ndarray, instruction: str) -> np.ndarray:
        raise ConnectionError("server is gone")

    with pytest.raises(InfrastructureError, match="step 0: ConnectionError: server is gone"):
        play(Recorder(), act)


def test_bad_input_stays_the_users() -> None:
    class NoSuchState(Recorder):
        def reset(self, init_state: int) -> None:
            raise UserError("init state 50", expected="0 to 49", remedy="Ask for fewer trials a task.")

    with pytest.raises(UserError, match="init state 50"):
        play(NoSuchState(), RIGHT)


def test_the_policy_sees_the_evaluation_image_and_the_viewer_an_upright_frame() -> None:
    seen, shown = [], []

    def act(image: np.ndarray, instruction: str) -> np.ndarray:
        seen.append((image.shape, image.dtype, instruction))
        return np.array([0.0, 0, 0, 0, 0, 0, 1])

    class Gradient(Recorder):
        def image(self, camera: str = "agentview") -> np.ndarray:
            return np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 256, 3))

    play(Gradient(), act, limit=2, on_frame=lambda frame: shown.append(frame[0, 0, 0]))
    assert seen == [((224, 224, 3), np.uint8, "move right")] * 2
    assert shown == [255, 255]  # LIBERO's bottom row comes first
