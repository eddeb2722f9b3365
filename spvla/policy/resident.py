"""Many LoRA versions beside one base: each gets a slot in every map's stack, from 1 on; 0 means the base alone.

Adding a version copies its A and B into a free slot and moves nothing else. When slots or rank run out the stacks grow,
and `version` tells holders of CUDA graphs that the tensors they recorded are gone.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spvla.errors import UserError
from spvla.policy.adapters import StoredAdapter
from spvla.policy.linear import Linear, PatchConv, Rows, Stack
from spvla.policy.openvla import OpenVLA
from spvla.policy.weights import read_json


class Residents:
    def __init__(self, model: OpenVLA) -> None:
        self.model = model
        self.rows = Rows()
        self.slots: dict[str, int] = {}
        self.rank = self.capacity = self.version = 0

    @property
    def names(self) -> list[str]:
        return list(self.slots)

    def add(self, name: str, adapter: StoredAdapter) -> None:
        """Raises CheckpointError, changing nothing, if the adapter does not fit the base."""
        maps = self._maps()
        adapter.require_base({f"{n}.weight": map_shape(m) for n, m in maps.items()})
        used = {*self.slots.values()}
        slot = self.slots.get(name) or next(i for i in range(1, len(used) + 2) if i not in used)
        capacity = self.capacity if slot <= self.capacity else max(1, 2 * self.capacity)
        if capacity > self.capacity or adapter.rank > self.rank:
            self._grow(maps, capacity, max(self.rank, adapter.rank))
        for module in maps.values():
            module.lora.a[slot - 1] = 0
            module.lora.b[slot - 1] = 0
        for key, a, b in adapter.pairs():
            stack = maps[key].lora
            stack.a[slot - 1, : adapter.rank] = a
            stack.b[slot - 1, : adapter.rank] = adapter.scale * b.float().T
        self.slots[name] = slot

    def remove(self, name: str) -> None:
        """The slot is free for another; when none is used the base runs without stacks again."""
        self._slot(name)
        del self.slots[name]
        if not self.slots:
            for module in self._maps().values():
                module.lora = None
            self.rank = self.capacity = 0
            self.version += 1

    def slots_of(self, names: Sequence[str | None]) -> list[int]:
        """Names of adapters, None for the base -> slots. Raises UserError listing what is resident."""
        return [0 if name is None else self._slot(name) for name in names]

    def _slot(self, name: str) -> int:
        if name not in self.slots:
            raise UserError(
                f"adapter {name!r}",
                expected=f"one of {', '.join(self.slots) or '(none is resident)'}",
                remedy="Add it with add_adapter.",
            )
        return self.slots[name]

    def _maps(self) -> dict[str, Linear | PatchConv]:
        return {n: m for n, m in self.model.named_modules() if hasattr(m, "lora")}

    def _grow(self, maps: dict[str, nn.Module], capacity: int, rank: int) -> None:
        for module in maps.values():
            old = module.lora
            outputs, inputs = map_shape(module)
            like = {"dtype": self.model.dtype, "device": self.model.device}
            a, b = torch.zeros(capacity, rank, inputs, **like), torch.zeros(capacity, rank, outputs, **like)
            new = Stack(a=a, b=b, rows=self.rows)
            if old is not None:
                new.a[: len(old.a), : old.a.shape[1]] = old.a
                new.b[: len(old.b), : old.b.shape[1]] = old.b
            module.lora = new
        self.capacity, self.rank, self.version = capacity, rank, self.version + 1


def map_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in); a quantised weight no longer shows it."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels * math.prod(module.kernel_size)
    return module.out_features, module.in_features


def read_statistics(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
