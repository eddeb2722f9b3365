"""A LoRA adapter on one linear map: y = W x + b + scale B A x (arxiv.org/abs/2106.09685).

A map computes W x + b and lets what is attached to it, if anything, `add` its part. Two forms can be: `LoraPair`, which
is trained (train/flat.py holds all of an adapter's as one vector), and `LoraColumns`, versions that are served side by
side (lora_bank.py). On disk an adapter is a `LoraFile` (lora_file.py).

A map may be several of a checkpoint's that read the same input (q, k, v; gate, up): its outputs then lie one after
another, and each has an A and a B of its own.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Lora(Protocol):
    def add(self, x: Tensor, y: Tensor, first: int = 0) -> Tensor:
        """Adds the adapter's part to a map's product: (B, T, in), (B, T, out) -> (B, T, out).

        first: y holds the outputs of that one of the joined maps and of those after it.
        """


@dataclass(frozen=True, kw_only=True)
class LoraPair:
    """One adapter's factors, as autograd sees them. n joined maps have rank r each."""

    a: Tensor  # (n r, in)
    b: Tensor  # (out, r)
    scale: float
    outs: tuple[int, ...]  # outputs of each joined map
    dropout: float = 0.0

    def add(self, x: Tensor, y: Tensor, first: int = 0) -> Tensor:
        a, parts = self.a[first * self.b.shape[1] :], self.b.split(self.outs)[first:]
        if self.dropout:
            x = F.dropout(x, self.dropout)
        narrow = self.scale * F.linear(x, a)  # (B, T, n r)
        return y + F.linear(narrow, parts[0] if len(parts) == 1 else torch.block_diag(*parts))
