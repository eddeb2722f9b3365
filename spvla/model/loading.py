"""A checkpoint's tensors into a model on the meta device: each moved as it is read, joined maps put together."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from spvla.model.linear import named_maps


def read_into(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], *, device: str, dtype: torch.dtype) -> None:
    """Replaces each meta parameter by its value; `tensors` go by the checkpoint's names."""
    joined = {name: named for name, named in named_maps(model).items() if name != named.path}
    waiting: dict[str, dict[int, Tensor]] = {}  # parts of joined weights
    for name, value in tensors:
        path, _, leaf = name.rpartition(".")
        if path not in joined:
            _place(model.get_submodule(path), leaf, value, device, dtype)
            continue
        named = joined[path]
        parts = waiting.setdefault(named.path, {})
        parts[named.part] = value
        if len(parts) == len(named.module.parts):
            del waiting[named.path]
            _place(named.module, leaf, torch.cat([parts[i] for i in range(len(parts))]), device, dtype)


def _place(module: nn.Module, leaf: str, value: Tensor, device: str, dtype: torch.dtype) -> None:
    if hasattr(module, "place"):  # a quantised map takes its weight in its own way
        parameter = module.place(leaf, value.to(dtype), device)
    else:
        parameter = nn.Parameter(value.to(device, dtype), requires_grad=False)
    setattr(module, leaf, parameter)
