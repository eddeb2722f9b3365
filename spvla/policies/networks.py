"""A checkpoint's network for training, and a trained one's checkpoint, whichever family it is of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from spvla.model.openvla import OpenVLA
from spvla.policies import checkpoint
from spvla.policies.oft import checkpoint as oft
from spvla.policies.oft.folder import form_to_train
from spvla.policies.oft.network import OpenVLAOFT
from spvla.policies.oft.parts import read_added, write_added
from spvla.policies.registry import NO_FLAGS, PolicyFlags


def load_network(
    base: Path, adapter: Path | None = None, *, flags: PolicyFlags = NO_FLAGS, seed: int = 0, **options: Any
) -> OpenVLA:
    """The network of a base, in the form of the adapter that is to join it, if any; `options` as of `load_model`.

    Flags may ask for a form that the base does not have yet: what is new begins at random weights, from `seed`.
    Raises CheckpointError, UserError.
    """
    form = form_to_train(adapter or base, flags)
    if form is None:
        return checkpoint.load_model(base, **options)
    model = oft.open_model(base, form, seed=seed, **options)
    if adapter is not None:
        read_added(model.added(), adapter)
    return model


def save_network(
    model: nn.Module, folder: Path, *, source: str | Path, norm_stats: Mapping[str, Any] | None = None
) -> None:
    """A whole checkpoint; config, tokenizer and processor come from `source`, its base."""
    save = oft.save_checkpoint if isinstance(model, OpenVLAOFT) else checkpoint.save_model
    save(model, folder, source=source, norm_stats=norm_stats)


def save_beside_adapter(model: nn.Module, folder: Path) -> None:
    """What a network has beside OpenVLA's weights and an adapter on them, into that adapter's folder."""
    if isinstance(model, OpenVLAOFT):
        write_added(model.added(), model.form, folder)
