"""LIBERO's init states, read without executing what a pickle may hold.

The files are torch.save archives whose payload is a pickled numpy array (N, 1 + nq + nv) float64: time, qpos, qvel.
Only the names that numpy itself needs are let through, and torch is never imported.
"""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np

from spvla.benchmarks.libero.suites import task_info
from spvla.errors import UserError

_ALLOWED = {
    "numpy._core.multiarray._reconstruct",
    "numpy._core.numeric._frombuffer",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
}


class _Unpickler(pickle.Unpickler):
    """Numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        module = module.replace("numpy.core", "numpy._core")  # numpy 1 wrote the former
        if f"{module}.{name}" not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def init_states(suite: str, task: int) -> np.ndarray:
    """(50, 1 + nq + nv) float64: time, qpos, qvel."""
    return load_init_states(task_info(suite, task).init_file)


def num_init_states(suite: str, task: int) -> int:
    return len(init_states(suite, task))


def load_init_states(path: Path) -> np.ndarray:
    """(N, 1 + nq + nv) float64. Raises UserError for a missing, truncated or foreign file."""
    try:
        states = _Unpickler(io.BytesIO(_payload(path))).load()
        if not (isinstance(states, np.ndarray) and states.ndim == 2 and states.dtype == np.float64):
            raise pickle.UnpicklingError("it holds no table of numbers")
    except FileNotFoundError:
        raise _refused(path, "is missing") from None
    except Exception as e:  # a broken pickle can raise anything; none of it is ours
        raise _refused(path, f"is refused ({e})") from e
    return states


def _payload(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl")))


def _refused(path: Path, why: str) -> UserError:
    return UserError(
        f"init state file {path} {why}",
        expected="one numpy array of states, saved by torch.save or pickle",
        remedy="Reinstall hf-libero, or take the file from a source you trust.",
    )
