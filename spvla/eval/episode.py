"""The evaluation protocol on one page: reset, settle unseen, then observe -> act -> step until success or limit.

A policy answers with a chunk of K actions, of which the first n wait in a queue; it is asked again when that is empty,
and only then are pictures drawn. A policy of one step is the case K = n = 1.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from spvla.errors import InfrastructureError, SpvlaError
from spvla.policies.observations import image_of
from spvla.policies.openvla.actions import gripper_to_env
from spvla.types import ACTION_DIM, Env, Needs, Observation, Outcome, Status, Trial

WAIT_ACTION = np.array([0.0, 0, 0, 0, 0, 0, -1])  # stand still, gripper open

Act = Callable[[Observation], np.ndarray]  # observation -> (K, 7) actions, gripper 1 open


def run_trial(
    env: Env,
    act: Act,
    trial: Trial,
    *,
    needs: Needs,
    num_steps_wait: int,
    center_crop: bool,
    max_steps: int,
    moments: list[object] | None = None,
) -> Outcome:
    """Plays one trial to its end. `moments` gets the environment's before each action, for a film of it.

    A policy that answers with anything but K times seven finite numbers has failed the trial. Whatever else goes wrong
    is no verdict on the policy and raises InfrastructureError, which names the task, init state and step.
    """
    started = time.monotonic()
    step, taken, status, note = -num_steps_wait, 0, Status.FAILURE, ""
    queue: deque[np.ndarray] = deque()  # actions (7,) that the policy has given and that are still to be executed
    try:
        env.reset(trial.init_state)
        for step in range(-num_steps_wait, max_steps):
            if step < 0:
                env.step(WAIT_ACTION)  # objects fall before the policy acts; success does not count yet
                continue
            if moments is not None:
                moments.append(env.moment())
            if not queue:
                chunk = act(observe(env, needs, center_crop=center_crop))
                if note := fault_of_chunk(chunk, needs.chunk, step):
                    break
                queue.extend(chunk[: needs.execute])
            action = queue.popleft()
            if note := fault_of_action(action, step):
                break
            taken = step + 1
            if env.step(gripper_to_env(action)):
                status = Status.SUCCESS
                break
        digest = env.state_digest()
    except SpvlaError:
        raise
    except Exception as e:
        where = f"{trial.suite} task {trial.task}, init state {trial.init_state}, step {step}"
        raise InfrastructureError(f"{where}: {type(e).__name__}: {e}") from e
    return Outcome(status=status, steps=taken, seconds=time.monotonic() - started, state_digest=digest, note=note)


def draw_film(env: Env, moments: Sequence[object]) -> list[np.ndarray]:
    """(256, 256, 3) uint8, upright: the main camera's picture of each moment."""
    return [env.image_at(moment)[::-1, ::-1] for moment in moments]


def observe(env: Env, needs: Needs, *, center_crop: bool) -> Observation:
    """What the policy sees now, and no more than it needs. The wrist's image goes the main image's way."""
    return Observation(
        images=tuple(
            image_of(env.image(camera), preprocessing=needs.preprocessing, center_crop=center_crop)
            for camera in needs.cameras
        ),
        instruction=env.instruction,
        proprio=env.proprio()[0] if needs.proprio else None,
    )


def fault_of_chunk(chunk: np.ndarray, length: int, step: int) -> str:
    """What is wrong with the form of a policy's answer, or nothing."""
    fits = np.shape(chunk) == (length, ACTION_DIM)
    return "" if fits else f"actions of shape {np.shape(chunk)} at step {step}"


def fault_of_action(action: np.ndarray, step: int) -> str:
    """Why an action cannot be executed, or nothing."""
    if np.isnan(action).any():
        return f"NaN action at step {step}"
    return "" if np.isfinite(action).all() else f"infinite action at step {step}"
