"""From a task's goal, as LIBERO's BDDL files state it, to skills: one rule for each kind of goal."""

import numpy as np

from spvla.benchmarks.libero.experts.furniture import pull_open, push_shut, swing_shut, turn_knob
from spvla.benchmarks.libero.experts.inserting import insert, roofed
from spvla.benchmarks.libero.experts.joints import Part
from spvla.benchmarks.libero.experts.motion import Motion
from spvla.benchmarks.libero.experts.pushing import slide
from spvla.benchmarks.libero.experts.scene import Scene
from spvla.benchmarks.libero.experts.skills import CannotDo, Expert, NoGrasp

ENOUGH = 0.125  # m a drawer is drawn out to take a bowl in; further out it stands in the hand's way
ORDER = {"open": 0, "turnon": 1, "in": 2, "on": 2, "close": 3}


def pursue(expert: Expert) -> Motion:
    """Works at the goals that are not yet met, in order, until all are or no way is left."""
    problem = expert.scene.problem
    for _ in range(3):
        unmet = [goal for goal in problem.parsed_problem["goal_state"] if not problem._eval_predicate(goal)]
        if not unmet:
            return
        for goal in sorted(unmet, key=lambda goal: ORDER[goal[0]]):
            try:
                yield from achieve(expert, goal)
            except CannotDo:
                if not expert.persists:
                    return
                yield from expert.release()


def achieve(expert: Expert, goal: list[str]) -> Motion:
    """One goal, such as ["in", "milk_1", "basket_1_contain_region"]."""
    kind, name, *rest = goal
    scene = expert.scene
    if kind == "open":
        yield from pull_open(expert, Part.of(scene, name))
    elif kind == "turnon":
        yield from turn_knob(expert, Part.of(scene, name))
    elif kind == "close":
        part = Part.of(scene, name)
        yield from (push_shut if part.slides else swing_shut)(expert, part)
    else:
        yield from bring(expert, name, rest[0])


def bring(expert: Expert, name: str, target: str) -> Motion:
    """Puts a thing in or on another thing or region, opening its drawer first where it has one."""
    region = expert.scene.problem.object_sites_dict.get(target)
    if region is not None and region.joints:
        part = Part.of(expert.scene, target)
        if part.slides and abs(part.value) < 0.8 * ENOUGH:
            yield from pull_open(expert, part, length=ENOUGH)
    if roofed(expert, target):
        yield from insert(expert, name, target)
        return
    try:
        yield from expert.pick(name, *spots(expert.scene, target))
    except NoGrasp:
        if region is None or region.parent_name is not None:  # no region of the table
            raise
        yield from slide(expert, name, target)
    else:
        yield from expert.place(name, *spots(expert.scene, target))


def spots(scene: Scene, target: str) -> list[np.ndarray]:
    """(3,) places on a target that will do: its middle; in a drawer also nearer its front, where there is more room
    above; beside the middle where several things are to stand."""
    middle = scene.where(target)
    region = scene.problem.object_sites_dict.get(target)
    if region is None:
        return [middle]
    if region.joints:
        return [middle + forward * Part.of(scene, target).outward for forward in (0, 0.01, 0.02)]
    goals = [goal for goal in scene.problem.parsed_problem["goal_state"] if goal[0] == "on" and goal[-1] == target]
    if len(goals) > 1:
        half = 0.6 * np.array([*region.size[:2], 0])
        return [middle + half * side for side in ([1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0])]
    return [middle]
