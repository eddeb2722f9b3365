"""From poses to actions: a closed loop at 20 Hz over LIBERO's OSC_POSE deltas.

An action's six numbers in [-1, 1] ask for up to 0.05 m and 0.5 rad from where the hand now is; the seventh is the
gripper's, -1 open and +1 closed. Full speed is about 13 mm and 0.065 rad a step (measured).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.spatial.transform import Rotation

from spvla.benchmarks.libero.experts.scene import Scene

OPEN, CLOSED = -1.0, 1.0
METRES, RADIANS = 0.05, 0.5  # what an action of 1 asks for
SLEW = 0.25  # largest change of the commanded velocity from one step to the next, of full scale
GAIN = 1.6  # of the loop, times the arm's own
PATIENCE = 16  # steps without getting closer
CLOSE = 0.03  # m from the goal: from here on, what friction and load hold back is added up and asked for as well
ASTRAY = 0.015  # m off a straight line at which the hand only goes back to it
DOWN = Rotation.from_matrix([[0, 1, 0], [1, 0, 0], [0, 0, -1]])  # the hand at rest: fingers down, closing along y

Motion = Iterator[np.ndarray]  # (7,) actions, one a step


@dataclass(frozen=True, kw_only=True)
class Pose:
    position: np.ndarray  # (3,) m, world
    rotation: Rotation

    def above(self, height: float) -> "Pose":
        """The same pose at another height."""
        return Pose(position=np.array([*self.position[:2], height]), rotation=self.rotation)

    def moved(self, *delta: float) -> "Pose":
        return Pose(position=self.position + np.array(delta), rotation=self.rotation)


@dataclass
class Arm:
    """The hand, as something that is told where to go. `pace` in (0, 1] is a demonstrator's temperament."""

    scene: Scene
    pace: float = 1.0
    gripper: float = OPEN
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(6))  # last commanded
    lag: np.ndarray = field(default_factory=lambda: np.zeros(3))  # m by which the arm falls short near its goals

    @property
    def pose(self) -> Pose:
        return Pose(position=self.scene.position, rotation=self.scene.rotation)

    def go(
        self,
        to: Pose,
        *,
        near: float = 0.004,
        turn_near: float = 0.05,
        pace: float = 1.0,
        straight: bool = False,
        steps: int = 90,
    ) -> Motion:
        """Moves until within `near` metres and `turn_near` rad, or until it gets no closer.

        `straight` keeps to the line from here to there, waiting where the arm is pulled off it.
        """
        best, since = np.inf, 0
        self.lag = np.zeros(3)
        line = _unit(to.position - self.scene.position) if straight else None
        for _ in range(steps):
            shift, turn = self._error(to)
            far = float(np.linalg.norm(shift)) + 0.1 * float(np.linalg.norm(turn))
            if np.linalg.norm(shift) < near and np.linalg.norm(turn) < turn_near:
                return
            best, since = (far, 0) if far < best - 5e-4 else (best, since + 1)
            if since > PATIENCE:
                return
            yield self.toward(to, pace, line)

    def through(self, *poses: Pose, pace: float = 1.0) -> Motion:
        """Passes by all but the last pose without stopping."""
        for pose in poses[:-1]:
            yield from self.go(pose, near=0.03, turn_near=0.5, pace=pace)
        yield from self.go(poses[-1], near=0.008, turn_near=0.08, pace=pace)

    def toward(self, to: Pose, pace: float = 1.0, line: np.ndarray | None = None) -> np.ndarray:
        """One step's action: proportional, limited in speed and in change of speed. `line`: direction to keep to."""
        shift, turn = self._error(to)
        self.lag = _limited(0.9 * self.lag + (0.2 * shift if np.linalg.norm(shift) < CLOSE else 0), CLOSE)
        if line is not None:
            shift = _kept_to(line, shift)
        shift = GAIN * shift + self.lag
        limit = self.pace * pace * self._ease(shift)
        wanted = np.concatenate([_limited(shift / METRES, limit), _limited(GAIN * turn / RADIANS, 0.7 * limit)])
        change = wanted - self.velocity
        self.velocity = self.velocity + np.concatenate([_limited(change[:3], SLEW), _limited(change[3:], SLEW)])
        return np.concatenate([np.clip(self.velocity, -1, 1), [self.gripper]])

    def _ease(self, shift: np.ndarray) -> float:
        """Slower outward as the arm straightens: near its full length it answers late and overshoots."""
        stretch = self.scene.stretch
        here = stretch(self.scene.position)
        outward = stretch(self.scene.position + 0.01 * _unit(shift)) - here
        return float(np.clip((0.68 - here) / 0.08, 0.3, 1)) if outward > 0.003 else 1.0

    def close(self, steps: int = 10) -> Motion:
        """Closes until the fingers stop."""
        yield from self._grip(CLOSED, steps)

    def open(self, steps: int = 6) -> Motion:
        yield from self._grip(OPEN, steps)

    def _grip(self, gripper: float, steps: int) -> Motion:
        self.gripper = gripper
        here, before = self.pose, np.inf
        for step in range(steps):
            if step > 4 and abs(before - self.scene.opening) < 2e-4:
                return
            before = self.scene.opening
            yield self.toward(here)

    def _error(self, to: Pose) -> tuple[np.ndarray, np.ndarray]:
        return to.position - self.scene.position, (to.rotation * self.scene.rotation.inv()).as_rotvec()


def _kept_to(line: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Back to the line first: the further off, the slower along it."""
    along = (shift @ line) * line
    aside = shift - along
    off = float(np.linalg.norm(aside))
    return 1.5 * aside + along * np.clip(1 - (off - 0.002) / ASTRAY, 0.15, 1)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-9)


def _limited(vector: np.ndarray, length: float) -> np.ndarray:
    norm = float(np.linalg.norm(vector))
    return vector if norm <= length else vector * (length / norm)


def yawed(angle: float) -> Rotation:
    """Fingers down, the hand turned by `angle` rad from rest about the vertical."""
    return Rotation.from_euler("z", angle) * DOWN
