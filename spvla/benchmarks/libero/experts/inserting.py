"""Putting a thing under a roof, as into a microwave: the hand leans, and comes in from the open side."""

import numpy as np
from scipy.spatial.transform import Rotation

from spvla.benchmarks.libero.experts.furniture import across
from spvla.benchmarks.libero.experts.grasps import HAND, MARGIN, grasps
from spvla.benchmarks.libero.experts.motion import Motion, Pose
from spvla.benchmarks.libero.experts.skills import CannotDo, Expert, NoGrasp, yaw_of

LEAN = np.radians(40)  # of the hand below the horizontal
OUTSIDE = 12.0  # cost of each metre by which a grasp is further in
LIFTED = 0.015  # m kept under the thing while it moves in
BESIDE = 0.03  # m round the middle of a region, where its floor or a wall would be
OVER = 0.01  # m round that middle, where a roof would be; furniture's points lie closer
FAR = 0.25  # m from the middle of a region, where its furniture has ended


def roofed(expert: Expert, target: str) -> bool:
    """Whether a region's own furniture stands above its middle."""
    region = expert.scene.problem.object_sites_dict.get(target)
    if region is None or region.parent_name not in expert.scene.problem.fixtures_dict:
        return False
    around = furniture_around(expert, target)
    return bool(((np.linalg.norm(around[:, :2], axis=1) < OVER) & (around[:, 2] > BESIDE)).any())


def furniture_around(expert: Expert, target: str) -> np.ndarray:
    """(N, 3) points of the furniture that a region is part of, from the region's middle."""
    scene = expert.scene
    return scene.cloud(scene.problem.object_sites_dict[target].parent_name) - scene.where(target)


def insert(expert: Expert, name: str, target: str) -> Motion:
    """Grasps a thing by what it turns to the open side, moves it in as far as the hand fits, and lets go."""
    arm, scene = expert.arm, expert.scene
    inward = way_in(expert, name, target)
    grip = leaning_grasp(expert, name, inward)
    before = grip.moved(*(-0.07 * grip.rotation.apply([0, 0, 1])))
    yield from arm.open(0 if scene.opening > 0.07 else 8)
    yield from arm.through(before.moved(0, 0, 0.06), before)
    yield from arm.go(grip, near=0.004, pace=0.6, straight=True)
    yield from arm.close()
    yield from arm.go(grip.moved(0, 0, 0.04), near=0.02, pace=0.6)
    if not scene.holds(name):
        raise CannotDo(f"grasp {name} from the side")
    outside, inside = ways_in(expert, name, target, inward)
    yield from arm.through(arm.pose.above(outside.position[2]), outside, pace=0.8)
    yield from arm.go(inside, near=0.006, pace=0.5, straight=True)
    yield from arm.go(inside.moved(0, 0, -LIFTED), near=0.004, pace=0.4, straight=True)
    yield from arm.open(8)
    yield from arm.go(arm.pose.moved(*(-0.12 * inward)), near=0.02, pace=0.7)
    yield from arm.go(arm.pose.moved(0, 0, 0.1), near=0.03)


def way_in(expert: Expert, name: str, target: str) -> np.ndarray:
    """(3,) horizontal unit vector along which nothing stands between the outside and the middle of a region."""
    around = expert.scene.obstacles(name) - expert.scene.where(target)
    turned = expert.scene.turned(target)

    def blocked(inward: np.ndarray) -> int:
        out = -(around @ inward)
        aside = np.linalg.norm(around + out[:, None] * inward, axis=1)
        return int(((out > 0) & (out < FAR) & (aside < BESIDE)).sum())

    sides = [turned.apply(side) for side in np.vstack([np.eye(3), -np.eye(3)])]
    level = [side for side in sides if abs(side[2]) < 0.1]
    best = min(level, key=blocked)
    if blocked(best):
        raise CannotDo(f"find the open side of {target}")
    return best


def leaning_grasp(expert: Expert, name: str, inward: np.ndarray) -> Pose:
    """The best grasp for a hand that leans towards `inward`; found as from above, in a world turned by as much."""
    scene = expert.scene
    center, upright = scene.where(name), across(inward)
    lean = Rotation.from_rotvec((np.pi / 2 - LEAN) * np.cross([0, 0, -1], inward))
    side = np.arange(-0.25, 0.25, 0.01)
    table = np.stack(np.meshgrid(side, side, [scene.ground - center[2]]), -1).reshape(-1, 3)
    others = np.concatenate([scene.obstacles(name) - center, table])
    found = grasps(
        lean.inv().apply(scene.cloud(name) - center),
        lean.inv().apply(others),
        ground=-np.inf,
        yaws=np.array([yaw_of(upright)]),
    )
    if not found:
        raise NoGrasp(f"find a grasp of {name} from the side")
    found.sort(key=lambda g: g.cost + OUTSIDE * float(lean.apply(g.pose.position) @ inward))
    best = found[expert.rng.integers(min(2 + expert.rehearsal, len(found)))].pose
    return Pose(position=lean.apply(best.position) + center, rotation=lean * best.rotation)


def ways_in(expert: Expert, name: str, target: str, inward: np.ndarray) -> tuple[Pose, Pose]:
    """The hand's poses with the held thing outside and inside, above the region's floor."""
    scene, here = expert.scene, expert.arm.pose
    middle, origin, cloud = scene.where(target), scene.where(name), scene.cloud(name)
    around = furniture_around(expert, target)
    beneath = (np.linalg.norm(around[:, :2], axis=1) < BESIDE) & (around[:, 2] < 0)
    floor = middle[2] + around[beneath, 2].max()
    aside = np.linalg.norm(around - (around @ inward)[:, None] * inward, axis=1)
    front = (around[aside < HAND[0]] @ inward).min()  # of the furniture, from the middle
    depth = min(0.0, front - MARGIN + (origin - here.position) @ inward)  # of the thing's origin
    start = front - 0.03 - ((cloud - origin) @ inward).max()
    height = floor + LIFTED + origin[2] - cloud[:, 2].min()

    def hand_with_origin_at(along: float) -> Pose:
        point = middle + along * inward
        return here.moved(*(np.array([*point[:2], height]) - origin))

    return hand_with_origin_at(start), hand_with_origin_at(depth)
