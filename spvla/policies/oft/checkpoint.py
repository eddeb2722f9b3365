"""OpenVLA-OFT checkpoints, read and written whole; folder.py knows the files that they add to OpenVLA's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spvla.files import new_folder
from spvla.policies.checkpoint import load_model, save_model
from spvla.policies.oft.form import OftForm
from spvla.policies.oft.network import OpenVLAOFT
from spvla.policies.oft.parts import find_part, read_added, write_added


def open_model(base: Path, form: OftForm, *, seed: int = 0, **options: Any) -> OpenVLAOFT:
    """The network of a checkpoint, in evaluation mode; `options` are those of `load_model`.

    A base that holds neither head nor projector, such as plain OpenVLA, gets random ones: they come with an adapter, or
    are to be trained. Raises CheckpointError.
    """
    model = OpenVLAOFT.around(load_model(base, **options), form, seed=seed)
    if any(find_part(base, part) is not None for part in model.added()):
        read_added(model.added(), base)
    return model.eval().requires_grad_(False)


def save_checkpoint(
    model: OpenVLAOFT, folder: Path, *, source: str | Path, norm_stats: Mapping[str, Any] | None = None
) -> None:
    """A whole checkpoint; config, tokenizer and processor come from `source`."""
    with new_folder(folder) as new:
        save_model(model.plain(), new, source=source, norm_stats=norm_stats)
        write_added(model.added(), model.form, new)
