"""A frame's picture at the policy's size, (224, 224, 3) uint8: from the store's JPEG, each time it is asked for."""

from typing import Protocol

import numpy as np

from spvla.data.store import FrameStore
from spvla.errors import DatasetError, UserError
from spvla.policies.openvla.images import decode_jpeg, resize_lanczos


class Frames(Protocol):
    """One data set's pictures. Threads may read at once."""

    def read(self, number: int, camera: str, out: np.ndarray) -> None:
        """Writes frame `number` of the store, as `camera` saw it, to `out` (224, 224, 3) uint8. Raises DatasetError."""


class StoredFrames:
    """Decodes and resizes: 1.3 ms of a core a picture."""

    def __init__(self, store: FrameStore) -> None:
        self.store = store

    def read(self, number: int, camera: str, out: np.ndarray) -> None:
        try:
            out[...] = resize_lanczos(decode_jpeg(self.store.jpeg(number, camera)))
        except UserError as e:
            raise DatasetError(
                f"frame {number} of {self.store.folder}: {e.got}",
                expected=e.expected,
                remedy="Run spvla index again.",
            ) from e
