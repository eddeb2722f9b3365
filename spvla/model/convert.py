"""`python -m spvla.model.convert FOLDER`: pickled weights (.bin, .pt) -> safetensors, without running their code.

torch's own `weights_only` reader takes tensors and plain containers and refuses everything else.
"""

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spvla.errors import CheckpointError, UserError
from spvla.files import writing_to
from spvla.model.weights import INDEX, PICKLES, SINGLE, pickles, write_tensors, write_weights


def convert(folder: Path) -> Path:
    """Writes model.safetensors (or shards) beside the pickles, which stay. Raises CheckpointError."""
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        raise CheckpointError(
            f"{folder} has safetensors already", expected="pickles only", remedy="Nothing to convert."
        )
    tensors: dict[str, torch.Tensor] = {}
    for path in pickles(folder):
        tensors.update(_tensors_of(_read(path)))
    if not tensors:
        raise CheckpointError(
            f"{folder} holds no pickled weights", expected=f"files {', '.join(PICKLES)}", remedy="Correct the folder."
        )
    name = SINGLE
    if (folder / "adapter_config.json").exists():
        name = "adapter_model.safetensors"
        write_tensors({k: v.contiguous() for k, v in tensors.items()}, folder / name)
    else:
        write_weights([(k, lambda v=v: v, v.nbytes) for k, v in sorted(tensors.items())], folder)
    return folder / name


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError) as e:
        raise CheckpointError(
            f"{path} holds more than tensors, or is truncated ({str(e).splitlines()[0]})",
            expected="a state dict",
            remedy="Convert it on a machine where you trust its code.",
        ) from e


def _tensors_of(value: Any) -> dict[str, torch.Tensor]:
    """A state dict, or one wrapped under 'model' or 'state_dict'."""
    for key in ("state_dict", "model"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    return {k: v for k, v in value.items() if isinstance(v, torch.Tensor)} if isinstance(value, Mapping) else {}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m spvla.model.convert FOLDER")
    try:
        with writing_to(Path(sys.argv[1])):
            print(convert(Path(sys.argv[1])))
    except UserError as e:
        print(f"spvla: {e}", file=sys.stderr)
        sys.exit(2)
