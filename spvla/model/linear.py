"""Linear maps that can carry an adapter, and several of them joined in one matrix product.

`lora` is None for the bare map, and then costs nothing. It is neither parameter nor buffer: a model's state dict has
the checkpoint's names, adapters or not.

Legend: B batch, T tokens.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spvla.model.lora import Lora, LoraPair


class Linear(nn.Linear):
    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.lora: Lora | None = None

    @property
    def matrix(self) -> Tensor:
        """(out, in)."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        if self.bias is None:
            return self.product(x)
        if isinstance(self.lora, LoraPair):
            return self.product(x) + self.bias  # in one step with LoRA's sum, once compiled
        y = F.linear(x, self.matrix, self.bias)
        return y if self.lora is None else self.lora.add(x, y)

    def product(self, x: Tensor) -> Tensor:
        """`forward` without the bias, for a caller whose next step adds it: cuBLAS has no such epilogue for each shape,
        and torch then writes the bias out first, a row for each of x."""
        y = F.linear(x, self.matrix)
        return y if self.lora is None else self.lora.add(x, y)


class PatchLinear(Linear):
    """Linear on flattened image patches; its weight has the shape (out, channels, side, side) of a convolution's."""

    def __init__(self, channels: int, out_features: int, side: int) -> None:
        super().__init__(channels * side * side, out_features)
        self.weight = nn.Parameter(self.weight.detach().view(out_features, channels, side, side))

    @property
    def matrix(self) -> Tensor:
        return self.weight.flatten(1)


class FusedLinear(Linear):
    """Several maps of one input, without biases, whose weights lie one after another in a single tensor.

    A checkpoint keeps each under its own name: see `keep_names`.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int]) -> None:
        """parts: {name in the checkpoint: outputs}."""
        super().__init__(in_features, sum(parts.values()), bias=False)
        self.parts = dict(parts)

    @property
    def outs(self) -> tuple[int, ...]:
        return tuple(self.parts.values())

    def after(self, x: Tensor, first: int) -> Tensor:
        """Outputs of part number `first` and of those behind it."""
        y = F.linear(x, self.weight[sum(self.outs[:first]) :])
        return y if self.lora is None else self.lora.add(x, y, first)


def keep_names(parent: nn.Module, child: str) -> None:
    """Lets the state dict of `parent` have the parts of its FusedLinear `child` under their own names, as views."""
    parent.register_state_dict_post_hook(partial(_split, child=child))
    parent.register_load_state_dict_pre_hook(partial(_join, child=child))


def _split(parent: nn.Module, state: dict[str, Tensor], prefix: str, _: Any, *, child: str) -> None:
    fused = getattr(parent, child)
    if isinstance(fused, FusedLinear):  # not what took its place, quantised
        weight = state.pop(f"{prefix}{child}.weight")
        for name, rows in zip(fused.parts, weight.split(fused.outs), strict=True):
            state[f"{prefix}{name}.weight"] = rows


def _join(parent: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any, child: str) -> None:
    names = [f"{prefix}{name}.weight" for name in getattr(parent, child).parts]
    if all(name in state for name in names):
        state[f"{prefix}{child}.weight"] = torch.cat([state.pop(name) for name in names])


class NamedMap(NamedTuple):
    """A linear map by the name that checkpoints know, and where it is computed."""

    name: str
    path: str  # of the module in the model
    module: nn.Module
    part: int  # which of the module's joined maps
    outputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in); a quantised weight no longer shows it."""
        return self.outputs, self.module.in_features


def joined_maps(model: nn.Module) -> dict[str, list[NamedMap]]:
    """Paths of the modules that compute a model's linear maps, in order, and the maps that each of them joins."""
    found = {}
    for path, module in model.named_modules():
        if not hasattr(module, "lora"):
            continue
        parent = path.rpartition(".")[0]
        parts = {f"{parent}.{name}": n for name, n in getattr(module, "parts", {}).items()}
        parts = parts or {path: module.out_features}
        found[path] = [NamedMap(name, path, module, i, n) for i, (name, n) in enumerate(parts.items())]
    return found


def named_maps(model: nn.Module) -> dict[str, NamedMap]:
    """Every linear map of a model by its name."""
    return {named.name: named for maps in joined_maps(model).values() for named in maps}


def add_to(y: Tensor, x: Tensor, linear: nn.Module) -> Tensor:
    """y + linear(x), in y's memory where it can be: (B, T, out), (B, T, in) -> (B, T, out). Without gradients."""
    if not isinstance(linear, Linear) or linear.bias is not None:
        return y + linear(x)
    y.view(-1, y.shape[-1]).addmm_(x.flatten(0, 1), linear.weight.T)  # the product adds as it writes
    return y if linear.lora is None else linear.lora.add(x, y)
