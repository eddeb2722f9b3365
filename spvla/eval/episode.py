"""The evaluation protocol on one page: reset, settle unseen, then frame -> action -> step until success or limit."""

import time
from collections.abc import Callable

import numpy as np

from spvla.errors import InfrastructureError, SpvlaError
from spvla.policies.openvla.actions import gripper_to_env
from spvla.policies.openvla.images import evaluation_image
from spvla.types import ACTION_DIM, Env, Outcome, Status, Trial

WAIT_ACTION = np.array([0.0, 0, 0, 0, 0, 0, -1])  # stand still, gripper open

Act = Callable[[np.ndarray, str], np.ndarray]  # (224, 224, 3) uint8, instruction -> (7,) action, gripper 1 open


def run_trial(
    env: Env,
    act: Act,
    trial: Trial,
    *,
    num_steps_wait: int,
    center_crop: bool,
    max_steps: int,
    on_frame: Callable[[np.ndarray], None] | None = None,
) -> Outcome:
    """Plays one trial to its end. `on_frame` gets every frame the policy acts on, (256, 256, 3) uint8, upright.

    A policy that answers with anything but seven finite numbers has failed the trial. Whatever else goes wrong is no
    verdict on the policy and raises InfrastructureError, which names the task, init state and step.
    """
    started = time.monotonic()
    step, taken, status, note = -num_steps_wait, 0, Status.FAILURE, ""
    try:
        env.reset(trial.init_state)
        for step in range(-num_steps_wait, max_steps):
            if step < 0:
                env.step(WAIT_ACTION)  # objects fall before the policy acts; success does not count yet
                continue
            observation = env.image()
            if on_frame is not None:
                on_frame(observation[::-1, ::-1])
            action = act(evaluation_image(observation, center_crop=center_crop), env.instruction)
            if fault := fault_of(action):
                note = f"{fault} at step {step}"
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


def fault_of(action: np.ndarray) -> str:
    """What is wrong with a policy's answer, or nothing."""
    if np.shape(action) != (ACTION_DIM,):
        return f"action of shape {np.shape(action)}"
    if np.isnan(action).any():
        return "NaN action"
    return "" if np.isfinite(action).all() else "infinite action"
