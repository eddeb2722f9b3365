"""Training state on disk, exactly and without pickle: tensors as safetensors, everything else as JSON.

A checkpoint is a folder that appears whole, by one rename: that rename is the commit, and the newest folder is where a
run goes on, whatever was killed in between.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from spvla import runs
from spvla.errors import CheckpointError
from spvla.files import discard, new_folder, write_json
from spvla.model.weights import write_tensors

STATE = "training_state"


def save_state(folder: Path, state: Any) -> None:
    """Writes a nest of dicts, lists, tuples, tensors, arrays, numbers and strings; bit for bit."""
    tensors: dict[str, torch.Tensor] = {}
    write_json(folder / f"{STATE}.json", _pack(state, tensors))
    write_tensors(tensors, folder / f"{STATE}.safetensors")


def load_state(folder: Path) -> Any:
    """Inverse of `save_state`, with tensors on the CPU. Raises CheckpointError."""
    try:
        packed = json.loads((folder / f"{STATE}.json").read_bytes())
        tensors = load_file(folder / f"{STATE}.safetensors")
        return _unpack(packed, tensors)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as e:
        raise CheckpointError(
            f"{folder} has no whole {STATE} ({e})",
            expected="a checkpoint written by spvla train",
            remedy="Delete this folder; the run then goes on from the checkpoint before it, or starts anew.",
        ) from e


def commit(run: Path, step: int, write: Callable[[Path], None], *, only_latest: bool) -> Path:
    """Lets `write` fill a folder that becomes RUN/checkpoints/step_NNNNNN whole, or not at all."""
    target = run / runs.CHECKPOINTS / runs.checkpoint_name(step)
    with new_folder(target) as folder:
        write(folder)
    if only_latest:
        prune(run / runs.CHECKPOINTS, keep=target)
    return target


def prune(folder: Path, *, keep: Path) -> None:
    """Removes every step_* folder but one, oldest first."""
    for other in sorted(folder.glob("step_*")):
        if other != keep:
            with suppress(OSError):  # it is only in the way; `sweep_out` tries again
                discard(other)


def sweep_out(run: Path) -> None:
    """Removes what a killed writer left half-written in the run's folder."""
    for folder in (run / runs.CHECKPOINTS, run / runs.MERGED):
        for debris in (*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old")):
            shutil.rmtree(debris, ignore_errors=True)


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON that remembers what JSON forgets: integer keys, tuples, and where each tensor goes."""
    if isinstance(value, np.ndarray):
        return {"array": _pack(torch.from_numpy(np.ascontiguousarray(value)), tensors)["tensor"]}
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()  # a clone: safetensors refuses shared storage
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_pack(v, tensors) for v in value]}
    if isinstance(value, np.generic):
        return value.item()
    assert value is None or isinstance(value, bool | int | float | str), f"cannot save a {type(value)}"
    return value


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "array":
        return tensors[inner].numpy()
    if kind == "dict":
        return {k: _unpack(v, tensors) for k, v in inner}
    items = [_unpack(v, tensors) for v in inner]
    return tuple(items) if kind == "tuple" else items
