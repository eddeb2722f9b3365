"""The protocol of one trial, played on the fake world of one number."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeEnv

from spvla.errors import InfrastructureError, UserError
from spvla.eval.episode import draw_film, run_trial
from spvla.policies.openvla.images import evaluation_image
from spvla.types import ONE_STEP, Needs, Observation, Outcome, Status, Trial

TRIAL = Trial(policy="p", suite="libero_object", task=3, init_state=0)


def play(
    env: FakeEnv, act: object, *, wait: int = 2, limit: int = 20, needs: Needs = ONE_STEP, **options: object
) -> Outcome:
    return run_trial(env, act, TRIAL, needs=needs, num_steps_wait=wait, center_crop=False, max_steps=limit, **options)


def constant(*values: float):
    return lambda observation: np.array([values], np.float64)


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
        ((0, 0, 0), "actions of shape (1, 3) at step 0"),
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
    def act(observation: Observation) -> np.ndarray:
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
    seen = []

    def act(observation: Observation) -> np.ndarray:
        (image,) = observation.images
        seen.append((image.shape, image.dtype, observation.instruction))
        return np.array([[0.0, 0, 0, 0, 0, 0, 1]])

    class Gradient(Recorder):
        def image(self, camera: str = "agentview") -> np.ndarray:
            return np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 256, 3))

    env, moments = Gradient(), []
    play(env, act, limit=2, moments=moments)
    assert seen == [((224, 224, 3), np.uint8, "move right")] * 2
    assert [frame[0, 0, 0] for frame in draw_film(env, moments)] == [255, 255]  # LIBERO's bottom row comes first


BOTH_CAMERAS = ("agentview", "robot0_eye_in_hand")


class Chunks:
    """Answers with K rows whose first entry counts them, from the first call on: 0, 1, ..., K - 1, K, ..."""

    def __init__(self, env: "Camera", chunk: int, gripper: float = 1.0) -> None:
        self.env, self.chunk, self.gripper = env, chunk, gripper
        self.asked_at: list[int] = []  # steps the world had made
        self.seen: list[Observation] = []

    def __call__(self, observation: Observation) -> np.ndarray:
        first = len(self.asked_at) * self.chunk
        self.asked_at.append(len(self.env.actions))
        self.seen.append(observation)
        rows = np.zeros((self.chunk, 7))
        rows[:, 0], rows[:, 6] = np.arange(first, first + self.chunk), self.gripper
        return rows


class Camera(Recorder):
    """Counts the pictures that are drawn, and is done once `steps` were made."""

    def __init__(self, steps: int = 10**9) -> None:
        super().__init__()
        self.done_after, self.drawn = steps, Counter()

    def step(self, action: np.ndarray) -> bool:
        super().step(action)
        return len(self.actions) >= self.done_after

    def image(self, camera: str = "agentview") -> np.ndarray:
        self.drawn[camera] += 1
        return np.full((256, 256, 3), 200 if camera == "agentview" else 60, np.uint8)


def test_a_chunk_is_executed_before_the_policy_is_asked_again_and_a_success_ends_it_halfway() -> None:
    env = Camera(steps=30)
    act = Chunks(env, 8)
    outcome = play(env, act, wait=10, limit=220, needs=Needs(chunk=8, execute=8))
    assert (outcome.status, outcome.steps) == (Status.SUCCESS, 20)
    assert act.asked_at == [10, 18, 26]
    assert [a[0] for a in env.actions[10:]] == list(range(20))


def test_of_a_longer_chunk_the_first_actions_are_executed() -> None:
    env = Camera()
    act = Chunks(env, 8)
    play(env, act, wait=0, limit=6, needs=Needs(chunk=8, execute=4))
    assert act.asked_at == [0, 4]
    assert [a[0] for a in env.actions] == [0, 1, 2, 3, 8, 9]


def test_pictures_are_drawn_only_for_who_looks() -> None:
    env = Camera()
    play(env, Chunks(env, 8), limit=16, needs=Needs(cameras=BOTH_CAMERAS, chunk=8, execute=8))
    assert env.drawn == {"agentview": 2, "robot0_eye_in_hand": 2}


def test_a_film_is_of_every_step_and_is_drawn_once_it_is_wanted() -> None:
    class Brightening(Camera):
        def image(self, camera: str = "agentview") -> np.ndarray:
            self.drawn[camera] += 1
            return FakeEnv.image(self, camera)

    env, moments = Brightening(), []
    steady = np.tile([0.25, 0, 0, 0, 0, 0, 1.0], (8, 1))
    play(env, lambda observation: steady, limit=4, needs=Needs(chunk=8, execute=8), moments=moments)
    assert env.drawn["agentview"] == 1
    frames, x = draw_film(env, moments), env.x
    assert [int(frame[0, 0, 0]) for frame in frames] == [128, 153, 178, 203] and env.x == x == 1.0


def test_the_wrist_goes_the_main_images_way_and_proprio_comes_as_measured() -> None:
    env = Camera()
    act = Chunks(env, 2)
    env.x = 0.25
    play(env, act, wait=0, limit=1, needs=Needs(cameras=BOTH_CAMERAS, proprio=True, chunk=2, execute=2))
    (observation,) = act.seen
    for image, camera in zip(observation.images, BOTH_CAMERAS, strict=True):
        assert np.array_equal(image, evaluation_image(Camera().image(camera), center_crop=False))
    assert observation.proprio.dtype == np.float32 and observation.proprio.tolist() == [0] * 8  # x after the reset


def test_a_policy_of_one_image_is_told_nothing_else() -> None:
    env = Camera()
    act = Chunks(env, 1)
    play(env, act, wait=0, limit=1)
    assert len(act.seen[0].images) == 1 and act.seen[0].proprio is None


def test_a_broken_action_late_in_a_chunk_fails_the_trial_when_its_turn_comes() -> None:
    rows = np.ones((4, 7))
    rows[2, 3] = np.nan
    env = Camera()
    outcome = play(env, lambda observation: rows, wait=0, needs=Needs(chunk=4, execute=4))
    assert (outcome.status, outcome.steps, outcome.note) == (Status.FAILURE, 2, "NaN action at step 2")
    never = play(Camera(), lambda observation: rows, wait=0, limit=5, needs=Needs(chunk=4, execute=2))
    assert (never.steps, never.note) == (5, "")  # the NaN is never executed


LOOP = Path(__file__).resolve().parent.parent / "../shared/golden/oft/loop.json"


@pytest.mark.skipif(not LOOP.exists(), reason="the recorded loop of OpenVLA-OFT's own code is not on this machine")
@pytest.mark.parametrize(
    ("name", "execute", "limit"),
    [("open_loop 8, never done", 8, 220), ("open_loop 12", 8, 220), ("done in a waiting step", 8, 220)],
)
def test_the_loop_is_the_originals(name: str, execute: int, limit: int) -> None:
    original = json.loads(LOOP.read_text())[name]
    env = Camera(original["env_steps"] if original["success"] else 10**9)
    act = Chunks(env, 8)
    outcome = play(env, act, wait=10, limit=limit, needs=Needs(chunk=8, execute=execute))
    assert (outcome.status is Status.SUCCESS) == original["success"]
    assert (len(env.actions), len(act.asked_at)) == (original["env_steps"], original["queries"])
    assert act.asked_at[:6] == original["queries_at_env_step"]
    assert np.array_equal(env.actions[0], original["waiting_action"])
    executed = [(query, index) for query, index, _ in original["first_actions (query, index in chunk, gripper sent)"]]
    assert [divmod(int(a[0]), 8) for a in env.actions[10:22]] == executed
