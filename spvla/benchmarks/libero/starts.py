"""Starts of our own: drawn as LIBERO's resets draw them, so that training never begins where evaluation does.

LIBERO's init states are what its reset gives: the arm's joints at rest but for a normal error, everything else where
the placement samplers put it, nothing moving. A drawn start is one more of these, decided by (seed, task, take) alone.
After LIBERO's ten settling steps it must still be what the task's BDDL file describes, or the next draw is taken.
"""

import mujoco
import numpy as np

from spvla.benchmarks.libero.env import LiberoEnv
from spvla.benchmarks.libero.placements import Start, place
from spvla.benchmarks.libero.stock import RandomizationError, drawing_from
from spvla.errors import InfrastructureError

JOINT_NOISE = 0.02  # rad, standard deviation of each of the arm's joints; robosuite's default
SETTLE = np.array([0, 0, 0, 0, 0, 0, -1.0])  # asks nothing of the arm and opens the hand
SETTLING_STEPS = 10  # objects fall before the hand moves, as in evaluation
STRAYED = 0.1  # m a thing may slide while it settles; in LIBERO's init states bowls do so by up to 0.055
MAX_DRAWS = 100


def settle(env: LiberoEnv) -> None:
    for _ in range(SETTLING_STEPS):
        env.step(SETTLE)


def initial_start(env: LiberoEnv, init_state: int) -> Start:
    """Where trial `init_state` of the task begins in evaluation."""
    return Start(state=env.init_states[init_state], placement=env.placements.episode(init_state))


def drawn_start(env: LiberoEnv, *, seed: int, take: int) -> Start:
    """A start that settles well. Leaves the world settled in it. Raises InfrastructureError when no draw does."""
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, env.task, take])))
    for _ in range(MAX_DRAWS):
        start = draw(env, generator)
        if start is None:
            continue
        env.begin(start)
        settle(env)
        if as_described(env) and not strayed(env, start):
            return start
    raise InfrastructureError(f"{env.task_name}: none of {MAX_DRAWS} drawn starts is what the task describes")


def draw(env: LiberoEnv, generator: np.random.RandomState) -> Start | None:
    """One draw, not settled; None where LIBERO finds no room for an object. Overwrites the world."""
    robot = env.robot
    with drawing_from(generator):
        mujoco.mj_resetData(env.model, env.data)
        noise = JOINT_NOISE * np.random.randn(len(robot.init_qpos))
        try:
            placement = place(env.env, env.placements.properties)
        except RandomizationError:
            return None
    qpos = placement.objects.copy()
    qpos[robot._ref_joint_pos_indexes] = robot.init_qpos + noise
    qpos[robot._ref_gripper_joint_pos_indexes] = robot.gripper.init_qpos
    return Start(state=np.concatenate([[0.0], qpos, np.zeros(env.model.nv)]), placement=placement)


def as_described(env: LiberoEnv) -> bool:
    """Whether what the BDDL file says of things and furniture holds: on or in each other, open or shut, lit or not.

    What it says of regions of the table tells the samplers where to draw, and is not asked again: some are 2 cm wide,
    or too low for a flat box, and LIBERO's own init states do not keep to them once they have settled.
    """
    problem = env.env
    regions = problem.parsed_problem["regions"]
    held = {*problem.objects_dict, *problem.fixtures_dict}
    for fact in problem.parsed_problem["initial_state"]:
        on_table = len(fact) == 3 and fact[2] in regions and regions[fact[2]]["target"] not in held
        if not on_table and not problem._eval_predicate(fact):
            return False
    return True


def strayed(env: LiberoEnv, start: Start) -> bool:
    """Whether something has slid or fallen off from where it was drawn, as where two things overlapped."""
    drawn = start.state[1 : 1 + env.model.nq]
    at = [env.model.joint(thing.joints[-1]).qposadr[0] for thing in env.env.objects_dict.values()]
    shifts = [np.linalg.norm(env.data.qpos[i : i + 2] - drawn[i : i + 2]) for i in at]
    return bool(max(shifts) > STRAYED)
