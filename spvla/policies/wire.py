"""Messages of the openpi websocket protocol: msgpack, with numpy arrays as small maps. No pickles.

    array   {"__ndarray__": true, "data": bytes, "dtype": "<f4", "shape": [...]}
    scalar  {"__npgeneric__": true, "data": number, "dtype": "<f4"}

Keys are byte strings, as the reference client (PyPI's openpi-client) has them. What comes in is not trusted: only
numbers and booleans are made into arrays, and only where size and shape agree.
"""

import math
from typing import Any

import msgpack
import numpy as np

from spvla.errors import UserError

NUMBERS = "biuf"  # dtype kinds: booleans, integers, floats
MAX_BYTES = 64 << 20  # of one message; an observation has 300 KB, or some MB with whole frames


def pack(message: Any) -> bytes:
    return msgpack.packb(message, default=_packed)


def unpack(data: bytes) -> Any:
    """Raises UserError for anything but such a message."""
    try:
        return msgpack.unpackb(data, object_hook=_unpacked)
    except UserError:
        raise
    except Exception as e:  # msgpack has a dozen kinds
        raise _refused(f"{type(e).__name__}: {e}") from e


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in NUMBERS:
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic) and value.dtype.kind in NUMBERS:
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} has no place in a message")


def _unpacked(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        dtype, shape, data = _dtype(value), value.get(b"shape"), value.get(b"data")
        whole = isinstance(shape, list | tuple) and all(isinstance(n, int) and n >= 0 for n in shape)
        if not (whole and isinstance(data, bytes) and len(data) == math.prod(shape) * dtype.itemsize):
            raise _refused(f"an array of shape {shape} and {dtype} in {len(data or b'')} bytes")
        return np.frombuffer(data, dtype).reshape(shape)
    if b"__npgeneric__" in value:
        return _dtype(value).type(value.get(b"data"))
    return value


def _dtype(value: dict[Any, Any]) -> np.dtype:
    dtype = np.dtype(value.get(b"dtype"))
    if dtype.kind not in NUMBERS:
        raise _refused(f"an array of {dtype}")
    return dtype


def _refused(why: str) -> UserError:
    return UserError(
        f"a message that cannot be read ({why})",
        expected="msgpack with arrays of numbers, as openpi's clients and servers send it",
        remedy="Check what is at the other end.",
    )
