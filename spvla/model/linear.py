"""Linear maps that can carry resident LoRA versions: one base, many adapters, each row of a batch naming its own.

A map's `lora` is None until a first adapter becomes resident, and then costs nothing for models without any. The stacks
are plain tensors, neither parameters nor buffers: a model's state dict has the checkpoint's names, adapters or not.

Legend: B batch, T tokens, N tokens of packed prompts, W columns.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(kw_only=True)
class Rows:
    """Which slot each row of the coming batch uses, 0 for the base; shared by all maps of a model."""

    slots: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))  # (B,)
    owners: Tensor | None = None  # (N,): the row of each packed token

    def of(self, x: Tensor) -> Tensor:
        """Slots (B, 1) for x (B, T, D); (1, N) for packed tokens (1, N, D)."""
        return self.slots[:, None] if len(x) == len(self.slots) else self.slots[self.owners][None]


@dataclass(kw_only=True)
class Part:
    """Resident adapters of one map, side by side: W columns, of which each adapter has its rank."""

    a: Tensor  # (W, in)
    b: Tensor  # (W, out), scale folded in
    slots: Tensor  # (W,) int64: whose column it is, -1 nobody's, whose numbers are zeros; the same for all maps


@dataclass(kw_only=True)
class Stack:
    """The resident adapters of one map: y += B[slot] A[slot] x.

    All adapters of a part multiply all tokens, and a mask keeps only the columns that a token asked for. The others add
    exact zeros, and a part's shape is fixed. So no bit of a result depends on which adapters are resident.
    """

    parts: list[Part]
    rows: Rows

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds to y, in its memory: (B, T, in), (B, T, out) -> (B, T, out)."""
        asked = self.rows.of(x)[..., None]  # (B, 1, 1) or (1, N, 1)
        for part in self.parts:
            narrow = F.linear(x, part.a).masked_fill(asked != part.slots, 0)  # (B, T, W)
            y.view(-1, y.shape[-1]).addmm_(narrow.flatten(0, 1), part.b)
        return y


class Linear(nn.Linear):
    lora: Stack | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.lora is None else self.lora.add(x, y)

    def product(self, x: Tensor) -> Tensor:
        """`forward` without the bias, for a caller whose next step adds it: cuBLAS has no such epilogue for each shape,
        and torch then writes the bias out first, a row for each of x."""
        y = F.linear(x, self.weight)
        return y if self.lora is None else self.lora.add(x, y)


class PatchConv(nn.Conv2d):
    """A convolution whose stride is its kernel, computed as the linear map of patches that it is.

    (B, 3, H, W) -> (B, out, H / 14, W / 14).
    """

    lora: Stack | None = None

    def forward(self, pixels: Tensor) -> Tensor:
        b, channels, height, width = pixels.shape
        side = self.kernel_size[0]
        grid = pixels.view(b, channels, height // side, side, width // side, side)
        patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, channels * side * side)  # (B, P, 3 * 14 * 14)
        y = F.linear(patches, self.weight.flatten(1), self.bias)
        y = y if self.lora is None else self.lora.add(patches, y)
        return y.transpose(1, 2).unflatten(2, (height // side, width // side))


def add_to(y: Tensor, x: Tensor, linear: nn.Module) -> Tensor:
    """y + linear(x), in y's memory where it can be: (B, T, out), (B, T, in) -> (B, T, out). Without gradients."""
    if type(linear) is not Linear or linear.bias is not None:
        return y + linear(x)
    y.view(-1, y.shape[-1]).addmm_(x.flatten(0, 1), linear.weight.T)  # the product adds as it writes
    return y if linear.lora is None else linear.lora.add(x, y)


def together(x: Tensor, maps: list[nn.Module], packed: Tensor | None) -> list[Tensor]:
    """Several maps of one input: a single matrix product where their weights lie in one tensor."""
    if packed is None:
        return [m(x) for m in maps]
    parts = F.linear(x, packed).split([m.out_features for m in maps], -1)
    return [y if m.lora is None else m.lora.add(x, y) for m, y in zip(maps, parts, strict=True)]


def pack(maps: list[nn.Module]) -> Tensor | None:
    """Lays the weights of plain maps one after another in one tensor, whose parts they become: no second copy.

    None where that cannot be: maps with a bias, wrapped by peft, or quantised.
    """
    if any(type(m) is not Linear or m.bias is not None for m in maps):
        return None
    packed = torch.cat([m.weight.data for m in maps])  # (sum of out, in)
    for m, rows in zip(maps, packed.split([m.out_features for m in maps]), strict=True):
        m.weight.data = rows
    return packed
