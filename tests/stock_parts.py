"""LIBERO's own evaluation environment, played and recorded, for comparison with ours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from spvla.benchmarks.libero import stock  # before libero: it keeps the import silent
from spvla.benchmarks.libero.assets import AssetSet
from spvla.benchmarks.libero.env import LiberoEnv
from spvla.benchmarks.libero.suites import task_info

CAMERAS = {"agentview": "agentview_image", "robot0_eye_in_hand": "robot0_eye_in_hand_image"}


@dataclass(frozen=True)
class Moment:
    """What a step leaves behind."""

    qpos: np.ndarray
    qvel: np.ndarray
    image: np.ndarray  # (256, 256, 3)
    proprio: np.ndarray  # (15,) float32
    success: bool


@contextmanager
def stock_env(suite: str, task: int, assets: AssetSet, cameras: Sequence[str] = ("agentview",)) -> Iterator:
    from libero.libero.envs import OffScreenRenderEnv

    stock.use_assets(assets.path)
    stock.cache_files(stock.MUJOCO_CACHE)  # its resets build the world again
    env = OffScreenRenderEnv(
        bddl_file_name=str(task_info(suite, task).bddl_file),
        camera_heights=256,
        camera_widths=256,
        camera_names=list(cameras),
    )
    env.seed(0)
    try:
        yield env
    finally:
        env.close()


def stock_moment(env: object, observation: dict, success: bool, camera: str = "agentview") -> Moment:
    o = observation
    axis_angle = stock.quat2axisangle(o["robot0_eef_quat"].copy())
    seen = [o["robot0_eef_pos"], axis_angle, o["robot0_gripper_qpos"], o["robot0_joint_pos"]]
    data = env.sim.data
    image = o[CAMERAS[camera]].copy()
    return Moment(data.qpos.copy(), data.qvel.copy(), image, np.concatenate(seen).astype(np.float32), success)


def stock_trial(env: object, init_state: np.ndarray, actions: np.ndarray, camera: str = "agentview") -> list[Moment]:
    """One episode after as many hard resets as the caller made."""
    moments = [stock_moment(env, env.set_init_state(init_state), False, camera)]
    for action in actions:
        observation, _, done, _ = env.step(action.tolist())
        moments.append(stock_moment(env, observation, bool(done), camera))
    return moments


def our_moment(env: LiberoEnv, success: bool, camera: str = "agentview") -> Moment:
    proprio = np.concatenate(env.proprio())
    return Moment(env.data.qpos.copy(), env.data.qvel.copy(), env.image(camera), proprio, success)


def our_trial(env: LiberoEnv, number: int, actions: np.ndarray, camera: str = "agentview") -> list[Moment]:
    env.reset(number)
    return [our_moment(env, False, camera)] + [our_moment(env, env.step(action), camera) for action in actions]


def rummage(env: LiberoEnv, number: int, steps: int) -> tuple[np.ndarray, int]:
    """Actions (steps, 7) that push and grasp at one object after another, and in how many steps the hand touched."""
    env.reset(number)
    rng = np.random.default_rng(number)
    bodies = [env.model.body(thing.root_body).id for thing in env.env.objects_dict.values()]
    actions, touched = [], 0
    for step in range(steps):
        aim = env.data.xpos[bodies[(number + step // 30) % len(bodies)]]
        away = aim - env.data.site_xpos[env.robot.eef_site_id]
        turn = rng.uniform(-0.4, 0.4, 3) * (step % 20 < 10)  # half the time the goal's rotation must stand
        action = np.concatenate([np.clip(12 * away, -1, 1), turn, [1.0 if step % 30 > 15 else -1.0]])
        actions.append(action)
        env.step(action)
        touched += hand_touches(env)
    return np.array(actions), touched


def hand_touches(env: LiberoEnv) -> bool:
    """Whether the gripper is in contact with anything but the robot."""
    names = [env.model.body(int(b)).name for b in env.model.geom_bodyid]
    gripper = {g for g, name in enumerate(names) if name.startswith("gripper0")}
    robot = gripper | {g for g, name in enumerate(names) if name.startswith("robot0")}
    return any((a in gripper and b not in robot) or (b in gripper and a not in robot) for a, b in env.data.contact.geom)


def differences(ours: list[Moment], theirs: list[Moment]) -> list[str]:
    """ "step: field" wherever two recordings are not equal to the bit."""
    assert len(ours) == len(theirs)
    return [
        f"{step}: {field}"
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True))
        for field in ("qpos", "qvel", "image", "proprio", "success")
        if not np.array_equal(getattr(a, field), getattr(b, field))
    ]
