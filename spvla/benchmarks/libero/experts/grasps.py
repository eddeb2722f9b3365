"""Where to grasp: every pose from above that fits the fingers around a part of the object, scored.

The fingers close along the hand's x; with x turned by `yaw` from the world's y, (c, w) are the coordinates across and
along the fingers. A part is a run of object points across the fingers with room for a finger on either side: a whole
box, the rim of a bowl, the handle of a mug.
"""

from dataclasses import dataclass

import numpy as np

from spvla.benchmarks.libero.experts.motion import Pose, yawed

OPENING = 0.0775  # m between the open fingers
FINGER_WIDTH = 0.0105  # m, half, along w
FINGER_THICKNESS = 0.0145  # m at the tip ...
FINGER_TAPER = 0.36  # ... and so much more for each metre above it
TIP = 0.0092  # m from the grip site to the fingertips
PAD = 0.006  # m, half the height of a pad
HAND = (0.104, 0.033, 0.031)  # m: half across, half along, from grip site up to the hand
MARGIN = 0.003  # m kept free
ROOMY = 0.018  # m beside the open fingers from which more is no better
STEEP = 0.012  # slope from which the fingers would slide off


@dataclass(frozen=True, kw_only=True)
class Grasp:
    pose: Pose
    cost: float
    width: float  # m of the part between the fingers


def grasps(
    object_points: np.ndarray,  # (N, 3)
    obstacles: np.ndarray,  # (M, 3), the object not among them
    *,
    ground: float,
    around: float = 0.0,  # rad: yaws near this one are cheap
    yaws: np.ndarray | None = None,
) -> list[Grasp]:
    """All grasps from above, cheapest first."""
    center = (object_points.min(0) + object_points.max(0)) / 2
    near = thinned(obstacles[np.linalg.norm(obstacles[:, :2] - center[:2], axis=1) < 0.2])
    object_points = thinned(object_points)
    found: list[Grasp] = []
    for yaw in np.radians(np.arange(-90, 90, 15)) if yaws is None else yaws:
        found += _with_yaw(float(yaw), object_points, near, center, ground, around)
    return sorted(found, key=lambda g: g.cost)


def thinned(points: np.ndarray, cell: float = 0.003) -> np.ndarray:
    """(N, 3) -> (M, 3): one point of each that share a cell; overlapping geoms have many."""
    if len(points) == 0:
        return points
    return points[np.unique(np.round(points / cell).astype(int), axis=0, return_index=True)[1]]


def _with_yaw(
    yaw: float, points: np.ndarray, near: np.ndarray, center: np.ndarray, ground: float, around: float
) -> list[Grasp]:
    rotation = yawed(yaw)
    axes = rotation.as_matrix()[:2, :2].T  # rows: x and y of the hand, in the world's x and y
    mine = np.column_stack([(points[:, :2] - center[:2]) @ axes.T, points[:, 2]])  # (N, 3) c, w, z
    others = np.column_stack([(near[:, :2] - center[:2]) @ axes.T, near[:, 2]])
    top, bottom = mine[:, 2].max(), mine[:, 2].min()
    lowest = max(ground + TIP + MARGIN, bottom + PAD)
    heights = np.arange(top - PAD, max(lowest, top - HAND[2] + MARGIN) - 1e-9, -0.006)
    if len(heights) == 0 or heights[-1] > lowest + 0.004:
        heights = np.append(heights, max(lowest, top - HAND[2] + MARGIN))
    everything = np.concatenate([mine, others])
    found = []
    for z in heights:
        for w in np.arange(mine[:, 1].min() + 0.004, mine[:, 1].max(), 0.006):
            for c, width, slope in _parts(mine, w, z):
                room = _room(everything, others, c, w, z)
                if room is None:
                    continue
                lever = float(np.hypot(c, w))
                tilt = abs(np.arctan2(np.sin(2 * (yaw - around)), np.cos(2 * (yaw - around)))) / 2
                cost = 8 * lever + 0.35 * tilt + 4 * slope + 3 * (top - z < PAD + 0.002) * 0.1 + 4 * abs(z - center[2])
                cost += 0.7 * max(0.0, ROOMY - room) / ROOMY
                position = np.array([*(center[:2] + axes.T @ [c, w]), z])
                found.append(Grasp(pose=Pose(position=position, rotation=rotation), cost=float(cost), width=width))
    return found


def _parts(mine: np.ndarray, w: float, z: float) -> list[tuple[float, float, float]]:
    """(middle, width, slope) of each part that the pads at (w, z) could press, across the fingers."""
    slab = mine[(abs(mine[:, 1] - w) < 0.009) & (abs(mine[:, 2] - z) < PAD)]
    if len(slab) < 4:
        return []
    order = np.argsort(slab[:, 0])
    across, along = slab[order, 0], slab[order, 1] - w
    cuts = np.flatnonzero(np.diff(across) > FINGER_THICKNESS + MARGIN)
    parts = []
    for run in np.split(np.arange(len(across)), cuts + 1):
        low, high = across[run[0]], across[run[-1]]
        slope = _slope(across[run], along[run])
        if high - low < OPENING - 2 * MARGIN and np.ptp(along[run]) > 0.006 and slope < STEEP:
            parts.append((float(low + high) / 2, float(high - low), slope))
    return parts


def _slope(across: np.ndarray, along: np.ndarray) -> float:
    """How far the two faces are from square to the fingers, in metres over half a pad's width."""
    left, right = along < 0, along >= 0
    if not left.any() or not right.any():
        return 0.01
    return float(abs(across[left].max() - across[right].max()) + abs(across[left].min() - across[right].min()))


def _room(everything: np.ndarray, others: np.ndarray, c: float, w: float, z: float) -> float | None:
    """Metres free beside the open fingers on their way down to (c, w, z); None when they do not fit."""
    x, y, height = abs(everything[:, 0] - c), abs(everything[:, 1] - w), everything[:, 2] - (z - TIP)
    inner = OPENING / 2 - MARGIN / 2
    outer = OPENING / 2 + FINGER_THICKNESS + FINGER_TAPER * np.clip(height, 0, 0.04) + MARGIN / 2
    beside = (y < FINGER_WIDTH + MARGIN) & (height > -MARGIN)
    if (beside & (x > inner) & (x < outer)).any():
        return None
    if len(others) and _hits_hand(others, c, w, z):
        return None
    free = x[beside & (x >= outer)]
    return float(min(free.min() - OPENING / 2 - FINGER_THICKNESS, 0.05)) if len(free) else 0.05


def _hits_hand(points: np.ndarray, c: float, w: float, z: float) -> bool:
    inside = (abs(points[:, 0] - c) < HAND[0] + MARGIN) & (abs(points[:, 1] - w) < HAND[1] + MARGIN)
    return bool((inside & (points[:, 2] > z + HAND[2] - MARGIN)).any())
