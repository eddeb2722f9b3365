"""The moving parts of furniture: drawers, doors and knobs, each one joint."""

from dataclasses import dataclass

import mujoco
import numpy as np
from scipy.spatial.transform import Rotation

from spvla.benchmarks.libero.experts.scene import Scene


@dataclass(frozen=True, kw_only=True)
class Part:
    """One joint and what it moves, where it now stands."""

    scene: Scene
    joint: int
    fixture: str  # LIBERO's name of the whole

    @classmethod
    def of(cls, scene: Scene, name: str) -> "Part":
        """Of a fixture with one moving part, or of a region inside one (a drawer's)."""
        problem = scene.problem
        region = problem.object_sites_dict.get(name)
        joints = region.joints if region is not None else problem.get_object(name).joints
        fixture = region.parent_name if region is not None else name
        return cls(scene=scene, joint=scene.model.joint(joints[0]).id, fixture=fixture)

    @property
    def value(self) -> float:
        return float(self.scene.data.qpos[self.scene.model.jnt_qposadr[self.joint]])

    @property
    def body(self) -> int:
        return int(self.scene.model.jnt_bodyid[self.joint])

    @property
    def axis(self) -> np.ndarray:
        return self.scene.data.xaxis[self.joint].copy()

    @property
    def anchor(self) -> np.ndarray:
        return self.scene.data.xanchor[self.joint].copy()

    @property
    def slides(self) -> bool:
        return bool(self.scene.model.jnt_type[self.joint] == mujoco.mjtJoint.mjJNT_SLIDE)

    @property
    def limits(self) -> tuple[float, float]:
        low, high = self.scene.model.jnt_range[self.joint]
        return float(low), float(high)

    @property
    def outward(self) -> np.ndarray:
        """Unit vector along which a drawer opens: its long way."""
        low, high = self.limits
        return self.axis * (1 if high > -low else -1)

    def cloud(self) -> np.ndarray:
        return self.scene.body_cloud(self.body)

    def handle(self) -> np.ndarray:
        """(N, 3) points of a drawer's handle: its outermost two centimetres."""
        cloud = self.cloud()
        out = cloud @ self.outward
        return cloud[out > out.max() - 0.02]

    def swung(self, points: np.ndarray, angle: float) -> np.ndarray:
        """Points of the part after it has turned by `angle` rad more."""
        return Rotation.from_rotvec(angle * self.axis).apply(points - self.anchor) + self.anchor
