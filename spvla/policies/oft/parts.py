"""The .pt files of OpenVLA-OFT checkpoints, and the marker that says which form a folder of this project's own has.

    action_head--N_checkpoint.pt          regresses the chunk (L1 form only)
    proprio_projector--N_checkpoint.pt    embeds the robot's state

They are state dicts of a data-parallel wrapper: names begin with `module.`. They are opened as weights alone, and every
tensor is checked by name and shape.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from spvla.errors import CheckpointError
from spvla.files import new_file, write_json
from spvla.model.lora_file import ADAPTER_CONFIG, MARKER_FILE
from spvla.model.weights import alone, read_json
from spvla.policies.oft.form import FAMILY, OftForm

CONFIG, MARKER = "config.json", "spvla"  # the file, and its entry; of an adapter it is MARKER_FILE's
_WRAPPER = "module."


def marker(folder: Path) -> OftForm | None:
    """The form that a folder of this project's own says it has."""
    path = _marked(folder)
    marked = read_json(path).get(MARKER) if path.exists() else None
    return OftForm.from_json(marked) if isinstance(marked, dict) and marked.get("family") == FAMILY else None


def mark(folder: Path, form: OftForm) -> None:
    path = _marked(folder)
    write_json(path, {**(read_json(path) if path.exists() else {}), MARKER: form.to_json()})


def _marked(folder: Path) -> Path:
    return folder / (MARKER_FILE if (folder / ADAPTER_CONFIG).exists() else CONFIG)


def find_part(folder: Path, part: str) -> Path | None:
    """The .pt file of a part, as the original finds it: by its name and the word checkpoint. Raises CheckpointError."""
    found = sorted(p for p in folder.glob("*checkpoint*") if part in p.name and p.is_file())
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} with {len(found)} files of {part} ({', '.join(p.name for p in found)})",
            expected="one",
            remedy="Keep the one that belongs to the model's weights.",
        )
    return found[0] if found else None


def read_added(added: Mapping[str, nn.Module], folder: Path) -> None:
    """Fills head and projector from the folder's files, whatever type those hold. Raises CheckpointError."""
    for part, module in added.items():
        path = find_part(folder, part)
        if path is None:
            raise CheckpointError(
                f"{folder} without {part}--N_checkpoint.pt",
                expected="the .pt files of its form",
                remedy="Copy the checkpoint again from its source.",
            )
        module.load_state_dict(read_tensors(path, {n: tuple(t.shape) for n, t in module.state_dict().items()}))


def read_tensors(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A .pt state dict without its wrapper's prefix: exactly the tensors that are `wanted`. Raises CheckpointError."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as e:
        raise _unreadable(path, f"more than tensors, or half a file ({str(e).splitlines()[0]})") from e
    if not isinstance(held, Mapping) or not all(isinstance(t, Tensor) for t in held.values()):
        raise _unreadable(path, "something else than tensors by name")
    tensors = {str(name).removeprefix(_WRAPPER): t for name, t in held.items()}
    for name in [*wanted, *tensors]:
        here, there = tensors.get(name), wanted.get(name)
        if here is None or there is None or tuple(here.shape) != there:
            raise CheckpointError(
                f"{path} holds {name} as {'nothing' if here is None else tuple(here.shape)}",
                expected=f"{there or 'no such tensor'}, as the language model's width and 7 action dimensions ask",
                remedy="Give the file that belongs to this model's weights.",
            )
        if not here.is_floating_point() or not here.isfinite().all():
            raise CheckpointError(
                f"{path} holds {name} of {here.dtype}, not finite everywhere",
                expected="finite floating-point numbers",
                remedy="Take another checkpoint.",
            )
    return tensors


def _unreadable(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds {what}",
        expected="a state dict of tensors and nothing else",
        remedy="Take the file from its source; nothing but tensors is ever opened.",
    )


def write_added(added: Mapping[str, nn.Module], form: OftForm, folder: Path, step: int | str = "latest") -> None:
    """Head and projector as the original's files, and the marker, into a folder whose config is there."""
    for part, module in added.items():
        state = {f"{_WRAPPER}{name}": alone(t) for name, t in module.state_dict().items()}
        with new_file(folder / f"{part}--{step}_checkpoint.pt") as beside:
            torch.save(state, beside)
    mark(folder, form)
