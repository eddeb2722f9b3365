"""Pushing what no grasp fits: the closed fingers stand on it and draw it over the table."""

from itertools import pairwise, product

import numpy as np

from spvla.benchmarks.libero.experts.clearance import lowest
from spvla.benchmarks.libero.experts.grasps import MARGIN
from spvla.benchmarks.libero.experts.motion import Motion, Pose, yawed
from spvla.benchmarks.libero.experts.skills import CannotDo, Expert

PRESS = 0.02  # m below the surface that the fingers are told to go: the friction of what they press moves the thing
OFF = 0.02  # m from the middle of the thing that the fingers may stand
EDGE = 0.01  # m of a region's rim that is not aimed at
BESIDE = 0.03  # m from obstacles from which more is no better
STRIDE = 0.004  # m a step; faster, the fingers slip ahead
ARRIVING = 8  # steps for the hand to catch up with the end of the way


def slide(expert: Expert, name: str, region: str) -> Motion:
    """Draws a flat thing into a region of the table it lies on, round what stands in the way."""
    arm, scene = expert.arm, expert.scene
    way = choose_way(expert, name, region)
    stand = choose_stand(expert, name)
    yield from arm.close()
    yield from expert.travel(stand, obstacles=scene.obstacles())
    pressed = stand.position[2] - MARGIN - PRESS
    yield from arm.go(stand.above(pressed), near=0.004, pace=0.5, straight=True)
    lead = scene.position - scene.where(name)  # of the fingers
    for point in [*between(scene.where(name)[:2], *way), *[way[-1]] * ARRIVING]:
        yield arm.toward(Pose(position=np.array([*(point + lead[:2]), pressed]), rotation=stand.rotation))
    yield from arm.go(arm.pose.moved(0, 0, 0.08), near=0.02, pace=0.7)
    yield from arm.open()
    if np.linalg.norm(scene.where(name)[:2] - way[-1]) > 0.1:
        raise CannotDo(f"push {name}")


def choose_stand(expert: Expert, name: str) -> Pose:
    """Where the closed fingers come down lowest on the thing, its middle and an unturned hand preferred."""
    scene = expert.scene
    middle, cloud, others = scene.where(name), scene.cloud(name), scene.obstacles(name)
    options: list[tuple[float, Pose]] = []
    for x, y, turn in product((0, -OFF, OFF), (0, -OFF, OFF), np.radians([0, -30, 30, -60, 60, 90])):
        at, rotation = middle[:2] + [x, y], yawed(turn)
        height = lowest(
            at,
            rotation,
            obstacles=np.concatenate([cloud, others]),
            held=np.zeros((0, 3)),
            opening=0.0,
            ground=scene.ground,
        )
        cost = height + 0.1 * np.hypot(x, y) + 0.01 * abs(turn)
        options.append((float(cost), Pose(position=np.array([*at, height]), rotation=rotation)))
    return min(options, key=lambda option: option[0])[1]


def choose_way(expert: Expert, name: str, region: str) -> list[np.ndarray]:
    """(2,) corners for the thing's middle to pass, of the straight way and the two that turn once the freest."""
    scene = expert.scene
    start = scene.where(name)[:2]
    radius = float(np.linalg.norm(scene.cloud(name)[:, :2] - start, axis=1).max())
    others = scene.obstacles(name)[:, :2]

    def room(point: np.ndarray) -> float:
        return min(float(np.linalg.norm(others - point, axis=1).min()) - radius, BESIDE)

    middle, half = scene.where(region)[:2], np.array(scene.problem.object_sites_dict[region].size[:2]) - EDGE
    spots = [middle + half * [x, y] for x in np.linspace(-1, 1, 5) for y in np.linspace(-1, 1, 5)]
    spot = max(spots, key=lambda point: room(point) - 0.2 * np.linalg.norm(point - middle))
    ways = [[spot], [np.array([start[0], spot[1]]), spot], [np.array([spot[0], start[1]]), spot]]
    return max(ways, key=lambda way: min(map(room, between(start, *way))))


def between(*corners: np.ndarray) -> list[np.ndarray]:
    """Points STRIDE apart along the corners, the first left out."""
    points = []
    for one, other in pairwise(corners):
        count = int(np.linalg.norm(other - one) / STRIDE) + 2
        points += list(np.linspace(one, other, count)[1:])
    return points
