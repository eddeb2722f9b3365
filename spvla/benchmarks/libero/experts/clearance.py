"""How low the hand may come, with what it holds, before something touches: height maps of point clouds."""

import numpy as np
from scipy.spatial.transform import Rotation

from spvla.benchmarks.libero.experts.grasps import FINGER_THICKNESS, FINGER_WIDTH, HAND, MARGIN, TIP

CELL = 0.006  # m, of a height map
TAPERED = 0.01  # m by which the fingers are thicker where they meet the hand


def lowest(
    at: np.ndarray,  # (2,) x and y of the hand
    rotation: Rotation,  # of the hand, fingers down
    *,
    obstacles: np.ndarray,  # (M, 3)
    held: np.ndarray,  # (N, 3) points of the held object in the hand's frame, N may be 0
    opening: float,  # m between the fingers
    ground: float,
) -> float:
    """Lowest height of the grip site over `at` that keeps MARGIN between all that moves and all that stands."""
    turn = rotation.as_matrix()
    flat = turn[:2, :2]  # columns: x and y of the hand in the world; fingers point down
    near = obstacles[np.linalg.norm(obstacles[:, :2] - at, axis=1) < 0.22]
    across = (near[:, :2] - at) @ flat  # (M, 2) c, w
    height = near[:, 2]
    under_hand = (abs(across[:, 0]) < HAND[0]) & (abs(across[:, 1]) < HAND[1])
    under_fingers = (abs(across[:, 0]) < opening / 2 + FINGER_THICKNESS + TAPERED) & (abs(across[:, 1]) < FINGER_WIDTH)
    bounds = [ground + TIP, *(height[under_hand] - HAND[2]), *(height[under_fingers] + TIP)]
    if len(held):
        bounds += _held_bounds(held @ turn.T, near - [*at, 0.0], ground)
    return float(max(bounds)) + MARGIN


def _held_bounds(held: np.ndarray, near: np.ndarray, ground: float) -> list[float]:
    """Heights at which the held points, column by column, would meet what is below them."""
    cells = np.round(held[:, :2] / CELL).astype(int)
    low = cells.min(0) - 1
    bottom = np.full(cells.max(0) - low + 2, np.inf)
    for dx, dy in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)):
        np.minimum.at(bottom, tuple((cells - low + [dx, dy]).T), held[:, 2])
    below = np.round(near[:, :2] / CELL).astype(int) - low
    inside = ((below >= 0) & (below < bottom.shape)).all(axis=1)
    gaps = near[inside, 2] - bottom[tuple(below[inside].T)]
    return [ground - float(held[:, 2].min()), *gaps[np.isfinite(gaps)]]


def lowest_along(start: np.ndarray, end: np.ndarray, rotation: Rotation, **kwargs: object) -> float:
    """Lowest height at which the hand may travel in a straight line between two (2,) points."""
    count = max(2, int(np.linalg.norm(end - start) / 0.03) + 1)
    ways = np.linspace(start, end, count)
    return max(lowest(way, rotation, **kwargs) for way in ways)  # type: ignore[arg-type]
