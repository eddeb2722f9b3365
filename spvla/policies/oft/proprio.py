"""The robot's state (8,) on its way into the policy: end-effector position, axis-angle, two gripper joints.

Scaled from its 1st..99th percentile to [-1, 1] and clipped. Training and evaluation differ in the original: training
works in float32 and gives 0 for a dimension that never varies, evaluation in float64 and gives -1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spvla.errors import UserError
from spvla.types import PROPRIO_DIM


@dataclass(frozen=True, kw_only=True, eq=False)
class ProprioStats:
    """The `proprio` entry of dataset_statistics.json, each (8,)."""

    q01: np.ndarray
    q99: np.ndarray
    min: np.ndarray
    max: np.ndarray
    mask: np.ndarray  # which dimensions are scaled; files without one scale all

    @classmethod
    def from_json(cls, d: Mapping[str, Sequence[float]], *, name: str) -> "ProprioStats":
        """`d` is the entry of data set `name`. Raises UserError where it is missing, or a place holder of zeros."""
        q01, q99 = (np.asarray(d.get(key, ()), np.float64) for key in ("q01", "q99"))
        if q01.shape != (PROPRIO_DIM,) or q99.shape != (PROPRIO_DIM,) or not (q01.any() or q99.any()):
            raise UserError(
                f"statistics of {name} without proprio",
                expected=f"proprio with q01 and q99 of {PROPRIO_DIM} numbers each, for a policy that reads it",
                remedy="Take the dataset_statistics.json that was written with the checkpoint, or index the data anew.",
            )
        low, high = (np.asarray(d.get(k, q), np.float64) for k, q in (("min", q01), ("max", q99)))
        return cls(q01=q01, q99=q99, min=low, max=high, mask=np.asarray(d.get("mask", np.ones(PROPRIO_DIM)), bool))

    def for_evaluation(self, state: np.ndarray) -> np.ndarray:
        """As measured (..., 8) -> float64 in [-1, 1], whatever the mask says; NaN stays NaN."""
        x = np.asarray(state, np.float64)
        scaled = np.where(self.mask, 2 * (x - self.q01) / (self.q99 - self.q01 + 1e-8) - 1, x)
        return np.clip(scaled, -1.0, 1.0)

    def for_training(self, state: np.ndarray) -> np.ndarray:
        """As recorded (..., 8) float32 -> float32 in [-1, 1] where masked; 0 where a dimension never varies."""
        x, one, two = np.asarray(state, np.float32), np.float32(1), np.float32(2)
        span = (self.q99 - self.q01 + 1e-8).astype(np.float32)
        scaled = np.clip(two * (x - self.q01.astype(np.float32)) / span - one, -one, one)
        return np.where(self.min == self.max, np.float32(0), np.where(self.mask, scaled, x))
