"""Many LoRA versions beside one base: each gets a slot, from 1 on, and columns in every map's stack. 0 is the base.

Columns come in parts of a fixed width, so that a product's shape, and with it the last bits of a result, does not
depend on what is resident. Adding a version copies its A and B into free columns and moves nothing else. When there are
none a part is added, and `version` tells holders of CUDA graphs that what they recorded is not all there is.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spvla.errors import UserError
from spvla.model.adapters import StoredAdapter
from spvla.model.linear import Linear, Part, PatchConv, Rows, Stack
from spvla.model.openvla import OpenVLA
from spvla.model.weights import read_json

PART = 128  # columns; memory and time of a part are those of four adapters of rank 32
LEAST = 32  # columns of an adapter: it begins at a multiple of its width
NOBODY = -1


class Residents:
    def __init__(self, model: OpenVLA) -> None:
        self.model = model
        self.rows = Rows()
        self.slots: dict[str, int] = {}
        self.columns: list[Tensor] = []  # of each part, (W,): whose they are
        self.version = 0

    @property
    def names(self) -> list[str]:
        return list(self.slots)

    def add(self, name: str, adapter: StoredAdapter) -> None:
        """Raises CheckpointError, changing nothing, if the adapter does not fit the base."""
        maps = self._maps()
        adapter.require_base({f"{n}.weight": map_shape(m) for n, m in maps.items()})
        if name in self.slots:
            self._clear(maps, self.slots.pop(name))
        slot = next(i for i in range(1, len(self.slots) + 2) if i not in self.slots.values())
        width = max(LEAST, 1 << (adapter.rank - 1).bit_length())
        part, first = self._free(width) or self._grow(maps, max(PART, width))
        for key, a, b in adapter.pairs():
            place = maps[key].lora.parts[part]
            place.a[first : first + adapter.rank] = a
            place.b[first : first + adapter.rank] = adapter.scale * b.float().T
        self.columns[part][first : first + width] = slot
        self.slots[name] = slot

    def remove(self, name: str) -> None:
        """Its columns are free for another; when none is used the base runs without stacks again."""
        maps = self._maps()
        self._clear(maps, self._slot(name))
        del self.slots[name]
        if not self.slots:
            for module in maps.values():
                module.lora = None
            self.columns = []
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

    def _free(self, width: int) -> tuple[int, int] | None:
        """A part of the shape for such an adapter, and its first free column there."""
        for part, owners in enumerate(self.columns):
            if len(owners) == max(PART, width):
                for first in range(0, len(owners), width):
                    if (owners[first : first + width] == NOBODY).all():
                        return part, first
        return None

    def _grow(self, maps: dict[str, nn.Module], width: int) -> tuple[int, int]:
        device, dtype = self.model.device, self.model.dtype
        owners = torch.full((width,), NOBODY, device=device)
        for module in maps.values():
            outputs, inputs = map_shape(module)
            a, b = (torch.zeros(width, size, dtype=dtype, device=device) for size in (inputs, outputs))
            parts = [] if module.lora is None else module.lora.parts
            module.lora = Stack(parts=[*parts, Part(a=a, b=b, slots=owners)], rows=self.rows)
        self.columns.append(owners)
        self.version += 1
        return len(self.columns) - 1, 0

    def _clear(self, maps: dict[str, nn.Module], slot: int) -> None:
        for part, owners in enumerate(self.columns):
            if its := (owners == slot).nonzero().flatten().tolist():
                columns = slice(its[0], its[-1] + 1)
                for module in maps.values():
                    module.lora.parts[part].a[columns] = 0
                    module.lora.parts[part].b[columns] = 0
                owners[columns] = NOBODY


def map_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in); a quantised weight no longer shows it."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels * math.prod(module.kernel_size)
    return module.out_features, module.in_features


def read_statistics(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
