"""Seven floats <-> 256 bins <-> token ids, and the statistics that normalise them.

OpenVLA uses the last 256 of Llama's 32000 ids: bin d = 1..256 is id 32000 - d, so 31744 stands for +1 and 31999 for -1.
Bins are 256 edges over [-1, 1] in float64; an id decodes to the centre between two edges, of which there are only 255,
so 31744 and 31745 decode alike. All functions take any leading shape; A is the action dimension (7).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spvla.errors import UserError
from spvla.types import ACTION_DIM

VOCAB_SIZE = 32_000  # the tokenizer's ids; the model pads them to 32064
NUM_BINS = 256
ACTION_TOKEN_BEGIN = VOCAB_SIZE - NUM_BINS - 1  # an id above this is an action
GRIPPER = ACTION_DIM - 1

_EDGES = np.linspace(-1.0, 1.0, NUM_BINS)  # float64: float32 edges would change 127 ids
_CENTERS = (_EDGES[:-1] + _EDGES[1:]) / 2.0  # (255,)


def encode(actions: np.ndarray) -> np.ndarray:
    """Normalised actions (..., A), float32 or float64 -> ids int64. NaN becomes 31744, as in the original."""
    return VOCAB_SIZE - np.digitize(np.clip(actions, -1.0, 1.0), _EDGES).astype(np.int64)


def decode(ids: np.ndarray) -> np.ndarray:
    """Ids (..., A) -> normalised actions float64. Ids that are no action clip to the nearest one."""
    return _CENTERS[np.clip(VOCAB_SIZE - np.asarray(ids, np.int64) - 1, 0, len(_CENTERS) - 1)]


def env_to_dataset(actions: np.ndarray) -> np.ndarray:
    """Raw LIBERO actions (..., A), gripper -1 open, +1 closed -> the data sets' form, gripper 1 open, 0 closed."""
    out = np.array(actions, np.float32)
    out[..., GRIPPER] = 1.0 - np.clip(out[..., GRIPPER], 0.0, 1.0)
    return out


def gripper_to_env(actions: np.ndarray) -> np.ndarray:
    """Policy actions (..., A), gripper 1 open, 0 closed -> raw LIBERO actions, gripper -1 open, +1 closed."""
    out = np.array(actions, np.float64)
    out[..., GRIPPER] = np.sign(2.0 * out[..., GRIPPER] - 1.0) * -1.0
    return out


@dataclass(frozen=True, kw_only=True, eq=False)
class ActionStats:
    """Statistics of a data set's actions, each (A,): the `action` entry of dataset_statistics.json.

    `mask` says which dimensions are scaled from their 1st..99th percentile to [-1, 1]; the gripper is not.
    """

    q01: np.ndarray
    q99: np.ndarray
    mask: np.ndarray
    min: np.ndarray
    max: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def from_json(cls, d: Mapping[str, Sequence[float]]) -> "ActionStats":
        """`d` is one data set's `action` entry. Without a mask every dimension is scaled, as in the original.

        Only `q01` and `q99` are needed to act; the others are NaN where `d` lacks them. Raises UserError.
        """
        for key in ("q01", "q99"):
            if key not in d:
                raise UserError(
                    f"action statistics without {key} (keys: {', '.join(d)})",
                    expected="q01 and q99, as in OpenVLA's dataset_statistics.json",
                    remedy="Take the file written beside the checkpoint or data set.",
                )
        q01 = np.asarray(d["q01"], np.float64)
        absent = np.full(q01.shape, np.nan)
        arrays = {key: np.asarray(d.get(key, absent), np.float64) for key in ("q99", "min", "max", "mean", "std")}
        return cls(q01=q01, mask=np.asarray(d.get("mask", np.ones(q01.shape)), bool), **arrays)

    def normalise(self, actions: np.ndarray) -> np.ndarray:
        """Dataset form (..., A) float32 -> float32 in [-1, 1] where masked; 0 where a dimension never varies.

        Equal to the original's to the bit: the width is taken in float64 and rounded once.
        """
        low, width = self.q01.astype(np.float32), (self.q99 - self.q01 + 1e-8).astype(np.float32)
        x = np.asarray(actions, np.float32)
        one, two = np.float32(1), np.float32(2)
        scaled = np.clip(two * (x - low) / width - one, -one, one)
        return np.where(self.min == self.max, np.float32(0), np.where(self.mask, scaled, x))

    def unnormalise(self, normalised: np.ndarray) -> np.ndarray:
        """Normalised actions (..., A) -> dataset form, float64."""
        n = np.asarray(normalised, np.float64)
        return np.where(self.mask, 0.5 * (n + 1.0) * (self.q99 - self.q01) + self.q01, n)
