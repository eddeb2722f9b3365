"""What an expert can do with furniture: open and close drawers and doors, turn knobs."""

import numpy as np
from scipy.spatial.transform import Rotation

from spvla.benchmarks.libero.experts.grasps import grasps
from spvla.benchmarks.libero.experts.joints import Part
from spvla.benchmarks.libero.experts.motion import CLOSED, DOWN, Motion, Pose, yawed
from spvla.benchmarks.libero.experts.skills import CannotDo, Expert

TILT = np.radians(20)  # of the hand below the horizontal while it pulls: its elbow would not reach lower
OVERLAP = 0.015  # m from the top of a door down to the grip site of the hand that pushes it
FINGERS = 0.016  # m from the middle of the closed fingers to what they push
BEYOND = 0.2  # rad past shut that a door is pushed, since the hand follows late
STRIDE = 0.006  # m a step along a door's arc
PRESSING = 14  # steps at its end
LEAN = np.radians(45)  # of the hand below the horizontal while it pushes a drawer in
BEFORE = 0.09  # m in front of a handle, where the hand stops and turns
TURN = 0.95  # rad a knob is turned: LIBERO's stoves burn from 0.5 on


def pull_open(expert: Expert, part: Part, *, length: float | None = None) -> Motion:
    """Takes a drawer's handle from the front, fingers above and below it, and draws it out: all the way by default."""
    arm = expert.arm
    handle = part.handle()
    center, rotation = (handle.min(0) + handle.max(0)) / 2, facing(-part.outward)
    grip = Pose(position=center + 0.002 * part.outward, rotation=rotation)
    ahead = Pose(position=center - BEFORE * rotation.apply([0, 0, 1]), rotation=rotation)
    yield from arm.open(0 if expert.scene.opening > 0.07 else 8)
    yield from arm.through(ahead.moved(*(0.08 * part.outward + [0, 0, 0.06])), ahead)
    yield from arm.go(ahead, near=0.006)
    yield from arm.go(grip, near=0.005, pace=0.6, straight=True)
    yield from arm.close()
    length = length or max(abs(limit) for limit in part.limits) + 0.01
    yield from arm.go(grip.moved(*((length - abs(part.value)) * part.outward)), near=0.004, pace=0.6)
    yield from arm.open(8)
    clear = arm.pose.moved(*(0.07 * part.outward))
    yield from arm.go(clear, near=0.02, pace=0.8)
    yield from arm.go(Pose(position=clear.position + [0, 0, 0.16], rotation=yawed(0)), near=0.05, turn_near=0.3)
    if abs(part.value) < 0.85 * length:
        raise CannotDo(f"open {part.fixture}")


def push_shut(expert: Expert, part: Part) -> Motion:
    """Pushes a drawer in by its handle, with the fingers closed and ahead of the hand, which fits under no handle."""
    arm = expert.arm
    handle = part.handle()
    center = (handle.min(0) + handle.max(0)) / 2
    start = Pose(position=center + 0.06 * part.outward - [0, 0, 0.005], rotation=across(part.outward))
    arm.gripper = CLOSED
    yield from expert.travel(start, obstacles=expert.scene.obstacles())
    ready = Pose(position=start.position, rotation=leaning(-part.outward, LEAN))
    yield from arm.go(ready.moved(0, 0, 0.03), near=0.02, pace=0.8)
    yield from arm.go(ready, near=0.01, pace=0.8)
    inside = start.position - (0.06 + abs(part.value) + 0.02) * part.outward
    yield from arm.go(Pose(position=inside, rotation=ready.rotation), near=0.004, pace=0.7, straight=True)
    yield from arm.go(ready, near=0.03)
    yield from arm.go(arm.pose.moved(0, 0, 0.08), near=0.03)


def swing_shut(expert: Expert, part: Part) -> Motion:
    """Pushes a door to from outside: closed fingers, their hand above the door, follow its arc and press at the end."""
    arm = expert.arm
    cloud = part.cloud()
    angle = min(part.limits, key=abs) - part.value
    reach = np.linalg.norm((cloud - part.anchor)[:, :2], axis=1)
    at = cloud[abs(reach - 0.75 * reach.max()) < 0.01]
    forward = np.sign(angle) * np.cross(part.axis, at.mean(0) - part.anchor)
    forward /= np.linalg.norm(forward)
    behind = at[(at @ forward).argmin()]
    point = np.array([*behind[:2], at[:, 2].max() - OVERLAP]) - FINGERS * forward
    arm.gripper = CLOSED
    start = Pose(position=point - 0.04 * forward, rotation=yawed(0))
    yield from expert.travel(start, obstacles=expert.scene.obstacles())
    yield from arm.go(start, near=0.01, pace=0.8)
    count = int(abs(angle) * np.linalg.norm((point - part.anchor)[:2]) / STRIDE)
    beyond = angle + np.sign(angle) * BEYOND
    for turned in [*np.linspace(0, beyond, count), *[beyond] * PRESSING]:
        yield arm.toward(Pose(position=part.swung(point, turned), rotation=start.rotation))
    yield from arm.go(arm.pose.moved(*(-0.05 * Rotation.from_rotvec(angle * part.axis).apply(forward))), near=0.02)
    yield from arm.go(arm.pose.moved(0, 0, 0.08), near=0.03)


def turn_knob(expert: Expert, part: Part) -> Motion:
    """Grasps a knob from above and turns hand and knob together about the knob's axis."""
    arm, scene = expert.arm, expert.scene
    angle = TURN * (1 if part.limits[1] > -part.limits[0] else -1)
    others = scene.obstacles(part.fixture)
    yaws = np.radians(np.arange(-90, 90, 7.5))
    fits = [yaw for yaw in yaws if abs(yaw + angle) < np.radians(100)]
    top = part.cloud()
    found = grasps(top, others, ground=top[:, 2].min(), around=-angle / 2, yaws=np.array(fits))
    if not found:
        raise CannotDo(f"find a grasp of {part.fixture}'s knob")
    grip = min(found, key=lambda g: g.cost + 5 * np.linalg.norm((g.pose.position - part.anchor)[:2])).pose
    yield from arm.open(0 if scene.opening > 0.07 else 8)
    yield from expert.travel(grip, obstacles=scene.obstacles())
    yield from arm.go(grip, near=0.004, pace=0.7, straight=True)
    yield from arm.close()
    for turned in np.linspace(0, angle, 7)[1:]:
        rotation = Rotation.from_rotvec(turned * part.axis) * grip.rotation
        position = part.swung(grip.position, turned)
        yield from arm.go(Pose(position=position, rotation=rotation), near=0.01, turn_near=0.12, pace=0.8)
    yield from arm.open(8)
    yield from arm.go(arm.pose.moved(0, 0, 0.08), near=0.02)


def facing(direction: np.ndarray) -> Rotation:
    """A hand that points along a horizontal direction, tilted down, closing up and down; the way nearest to rest."""
    z = np.cos(TILT) * direction - np.sin(TILT) * np.array([0, 0, 1])
    options = []
    for sign in (1, -1):
        y = sign * np.cross([0, 0, 1], direction)
        options.append(Rotation.from_matrix(np.stack([np.cross(y, z), y, z], axis=1)))
    return min(options, key=lambda rotation: (rotation * DOWN.inv()).magnitude())


def across(direction: np.ndarray) -> Rotation:
    """Fingers down, closing across a horizontal direction; the yaw nearest to rest."""
    yaw = np.arctan2(direction[1], direction[0])  # at rest the fingers close along y, across x
    return yawed(float((yaw + np.pi / 2) % np.pi - np.pi / 2))


def leaning(direction: np.ndarray, angle: float) -> Rotation:
    """As `across`, the fingers then swung forward until they point `angle` rad below that direction."""
    forward = np.cross([0, 0, -1], direction)
    return Rotation.from_rotvec((np.pi / 2 - angle) * forward) * across(direction)
