"""What an expert can do: each skill a generator of actions that looks at the scene before every step."""

from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.spatial.transform import Rotation

from spvla.benchmarks.libero.experts.clearance import lowest, lowest_along
from spvla.benchmarks.libero.experts.grasps import OPENING, Grasp, grasps, thinned
from spvla.benchmarks.libero.experts.motion import DOWN, Arm, Motion, Pose
from spvla.benchmarks.libero.experts.scene import Scene

NOTHING = np.zeros((0, 3))
LIFT = 0.02  # m kept above whatever lies on the way
COMFORTABLE = 0.60  # m from shoulder to wrist
CONSIDERED = 8  # grasps that are tried in thought


class CannotDo(Exception):
    """The skill found no way: no grasp fits, or the object slipped too often."""


class NoGrasp(CannotDo):
    """The thing as it stands fits between no fingers that come from above."""


@dataclass
class Expert:
    """A demonstrator of one episode. `rng` gives it small habits: pace, travel height, which good grasp."""

    scene: Scene
    arm: Arm
    rng: np.random.Generator
    rehearsal: int = 0  # attempts before this one
    persists: bool = True  # grasps again what slipped; else the attempt ends there

    # --- pick and place

    def pick(self, name: str, *spots: np.ndarray) -> Motion:
        """Grasps a thing from above, in a way that also suits where it goes, and lifts it clear of the table."""
        for attempt in range(3 if self.persists else 1):
            grasp = self.choose_grasp(name, spots, skip=attempt)
            yield from self.arm.open(0 if self.scene.opening > OPENING - 0.01 else 8)
            yield from self.travel(grasp.pose, obstacles=self.scene.obstacles())
            yield from self.arm.go(grasp.pose, near=0.003, pace=0.7, straight=True)
            if np.linalg.norm(self.scene.position - grasp.pose.position) > 0.02:
                continue
            yield from self.arm.close()
            yield from self.arm.go(grasp.pose.moved(0, 0, 0.04), near=0.02, pace=0.6)
            if self.scene.holds(name):
                return
        raise CannotDo(f"grasp {name}")

    def choose_grasp(self, name: str, spots: tuple[np.ndarray, ...], *, skip: int = 0) -> Grasp:
        """Where room is so scarce that there are several `spots`, each grasp is tried at each of them in thought."""
        obstacles = self.scene.obstacles(name)
        found = grasps(self.scene.cloud(name), obstacles, ground=self.scene.ground)
        if not found:
            raise NoGrasp(f"find a grasp of {name}")
        carried = spots[0] - self.scene.where(name)
        found.sort(key=lambda g: g.cost + self._strain(g.pose.position) + self._strain(g.pose.position + carried))
        if len(spots) > 1:
            low, near = partial(self.release_pose, name, turn=True), thinned(obstacles)
            found = distinct(found, CONSIDERED)
            found.sort(key=lambda g: min(low(spot, near, hand=g.pose).position[2] for spot in spots))
        if len(found) <= skip:
            raise NoGrasp(f"find another grasp of {name}")
        if skip:
            return found[min(len(found) - 1, 5 * skip)]
        if self.rehearsal:
            found = distinct(found, 2 + 2 * self.rehearsal)
            return found[self.rng.integers(len(found))]
        return found[self.rng.integers(min(3, len(found)))]

    def _strain(self, position: np.ndarray) -> float:
        return 4 * max(0.0, self.scene.stretch(position) - COMFORTABLE)

    def travel(self, to: Pose, *, obstacles: np.ndarray, held: np.ndarray = NOTHING, margin: float = LIFT) -> Motion:
        """Up, across and to a point straight above `to`, clear of everything on the way."""
        here = self.arm.pose
        clear = {"obstacles": obstacles, "held": held, "opening": self.scene.opening, "ground": self.scene.ground}
        height = lowest_along(here.position[:2], to.position[:2], to.rotation, **clear)
        height += margin + self.rng.uniform(0, 0.02)
        height = max(height, min(here.position[2], to.position[2] + 0.1))
        rise = here.above(max(height, here.position[2]))
        ways = [rise] if height > here.position[2] + 0.01 else []
        yield from self.arm.through(*ways, to.above(height))

    def place(self, name: str, *spots: np.ndarray) -> Motion:
        """Brings a held thing's origin over the spot (x, y) where it comes lowest, lowers it there, and lets go."""
        obstacles = self.scene.obstacles(name)
        ways = [(spot, self.release_pose(name, spot, obstacles, turn=True)) for spot in spots]
        spot, pose = min(ways, key=lambda way: way[1].position[2])
        yield from self.travel(pose, obstacles=obstacles, held=self.held(name))
        if not self.scene.holds(name):
            raise CannotDo(f"keep hold of {name}")
        pose = self.release_pose(name, spot, obstacles, turn=False)
        yield from self.arm.go(pose, near=0.006, pace=0.6, straight=True)
        yield from self.release()

    def release_pose(
        self, name: str, target: np.ndarray, obstacles: np.ndarray, *, turn: bool, hand: Pose | None = None
    ) -> Pose:
        """The lowest of the hand's poses that put the held thing over `target`; turning costs height.

        `hand`: where the thing is or will be grasped, if not where the hand now is.
        """
        here, held = hand or self.arm.pose, self.held(name, hand)
        offset = here.rotation.inv().apply(self.scene.where(name) - here.position)
        options: list[tuple[float, Pose]] = []
        for angle in np.radians([0, -30, 30, -60, 60, -90, 90] if turn else [0]):
            rotation = Rotation.from_euler("z", angle) * here.rotation
            if abs(yaw_of(rotation)) > np.radians(110):
                continue
            at = target[:2] - rotation.apply(offset)[:2]
            height = lowest(
                at,
                rotation,
                obstacles=obstacles,
                held=held,
                opening=(self.scene.opening if hand is None else 0.0) + 0.02,
                ground=self.scene.ground,
            )
            pose = Pose(position=np.array([*at, height]), rotation=rotation)
            options.append((height + 0.02 * abs(angle), pose))
        return min(options, key=lambda option: option[0])[1]

    def held(self, name: str, hand: Pose | None = None) -> np.ndarray:
        """(N, 3) points of a held thing in the hand's frame."""
        here = hand or self.arm.pose
        return here.rotation.inv().apply(self.scene.cloud(name) - here.position)

    def release(self, rise: float = 0.06) -> Motion:
        """Lets go, then draws back straight up while the fingers still open."""
        yield from self.arm.open(5)
        yield from self.arm.go(self.arm.pose.moved(0, 0, rise), near=0.02, pace=0.7)


def distinct(found: list[Grasp], count: int) -> list[Grasp]:
    """The first `count` of which no two are much alike."""
    kept: list[Grasp] = []
    for grasp in found:
        if len(kept) == count:
            break
        if not any(alike(grasp.pose, other.pose) for other in kept):
            kept.append(grasp)
    return kept


def alike(one: Pose, other: Pose) -> bool:
    turn = (one.rotation * other.rotation.inv()).magnitude()
    return bool(np.linalg.norm(one.position - other.position) < 0.012 and turn < np.radians(20))


def yaw_of(rotation: Rotation) -> float:
    """Angle of a downward hand from rest about the vertical, rad in (-pi, pi]."""
    return float((rotation * DOWN.inv()).as_euler("ZYX")[0])
