"""Many LoRA versions beside one base, each row of a batch naming its own: what is served.

Each version gets a slot, from 1 on, and columns in every map's `LoraColumns`. Slot 0 is the base. Columns come in
blocks of a fixed width, so that a product's shape, and with it the last bits of a result, does not depend on what is
resident. Adding a version copies its A and B into free columns and moves nothing else. When there are none a block is
added, and `version` tells holders of CUDA graphs that what they recorded is not all there is.

Legend: B batch, T tokens, N tokens of packed prompts, W columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from spvla.errors import UserError
from spvla.model.linear import joined_maps, named_maps
from spvla.model.lora_file import LoraFile
from spvla.model.openvla import OpenVLA

BLOCK = 128  # columns; memory and time of a block are those of four adapters of rank 32
LEAST = 32  # columns of an adapter: it begins at a multiple of its width
NOBODY = -1


@dataclass(kw_only=True)
class RowSlots:
    """Which slot each row of the coming batch uses, 0 for the base; shared by all maps of a model."""

    slots: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))  # (B,)
    owners: Tensor | None = None  # (N,): the row of each packed token

    def of(self, x: Tensor) -> Tensor:
        """Slots (B, 1) for x (B, T, D); (1, N) for packed tokens (1, N, D)."""
        return self.slots[:, None] if len(x) == len(self.slots) else self.slots[self.owners][None]


@dataclass(kw_only=True)
class ColumnBlock:
    """Resident adapters of one map, side by side: W columns, of which each adapter has its rank."""

    a: list[Tensor]  # of each joined map, (W, in)
    b: list[Tensor]  # of each joined map, (W, out), scale folded in
    owners: Tensor  # (W,) int64: whose column it is, -1 nobody's, whose numbers are zeros; the same for all maps


@dataclass(kw_only=True)
class LoraColumns:
    """The resident adapters of one map: y += B[slot] A[slot] x.

    All adapters of a block multiply all tokens, and a mask keeps only the columns that a token asked for. The others
    add exact zeros, and a block's shape is fixed. So no bit of a result depends on which adapters are resident.
    """

    outs: tuple[int, ...]  # outputs of each joined map
    blocks: list[ColumnBlock]
    slots: RowSlots

    def add(self, x: Tensor, y: Tensor, first: int = 0) -> Tensor:
        """Adds to y, in its memory: (B, T, in), (B, T, out) -> (B, T, out). See `lora.Lora`."""
        asked = self.slots.of(x)[..., None]  # (B, 1, 1) or (1, N, 1)
        for block in self.blocks:
            parts = y.split(self.outs[first:], -1)
            for a, b, part in zip(block.a[first:], block.b[first:], parts, strict=True):
                narrow = F.linear(x, a).masked_fill(asked != block.owners, 0)  # (B, T, W)
                part.view(-1, part.shape[-1]).addmm_(narrow.flatten(0, 1), b)
        return y


class LoraBank:
    def __init__(self, model: OpenVLA) -> None:
        self.model, self.maps = model, named_maps(model)
        self.slots = RowSlots()
        self.resident: dict[str, int] = {}  # name -> slot
        self.owners: list[Tensor] = []  # of each block, (W,)
        self.version = 0

    @property
    def names(self) -> list[str]:
        return list(self.resident)

    def add(self, name: str, adapter: LoraFile) -> None:
        """Raises CheckpointError, changing nothing, if the adapter does not fit the base."""
        shapes = {key: named.shape for key, named in self.maps.items()}
        adapter.require(shapes, lambda key: self.model.state_dict().get(key))
        if name in self.resident:
            self._clear(self.resident.pop(name))
        slot = next(i for i in range(1, len(self.resident) + 2) if i not in self.resident.values())
        width = max(LEAST, 1 << (adapter.rank - 1).bit_length())
        block, first = self._free(width) or self._grow(max(BLOCK, width))
        for key, (a, b) in adapter.factors.items():
            columns, part = self.maps[key].module.lora.blocks[block], self.maps[key].part
            columns.a[part][first : first + adapter.rank] = a.flatten(1)
            columns.b[part][first : first + adapter.rank] = adapter.scale * b.flatten(1).float().T
        self.owners[block][first : first + width] = slot
        self.resident[name] = slot

    def remove(self, name: str) -> None:
        """Its columns are free for another; when none is used the base runs bare again."""
        self._clear(self._slot(name))
        del self.resident[name]
        if not self.resident:
            for named in self.maps.values():
                named.module.lora = None
            self.owners = []
            self.version += 1

    def slots_of(self, names: Sequence[str | None]) -> list[int]:
        """Names of adapters, None for the base -> slots. Raises UserError listing what is resident."""
        return [0 if name is None else self._slot(name) for name in names]

    def _slot(self, name: str) -> int:
        if name not in self.resident:
            raise UserError(
                f"adapter {name!r}",
                expected=f"one of {', '.join(self.resident) or '(none is resident)'}",
                remedy="Add it with add_adapter.",
            )
        return self.resident[name]

    def _free(self, width: int) -> tuple[int, int] | None:
        """A block of the shape for such an adapter, and its first free column there."""
        for block, owners in enumerate(self.owners):
            if len(owners) == max(BLOCK, width):
                for first in range(0, len(owners), width):
                    if (owners[first : first + width] == NOBODY).all():
                        return block, first
        return None

    def _grow(self, width: int) -> tuple[int, int]:
        """A block more, of so many columns, for every map."""
        like = {"dtype": self.model.dtype, "device": self.model.device}
        owners = torch.full((width,), NOBODY, device=self.model.device)
        for maps in joined_maps(self.model).values():
            module = maps[0].module
            a = [torch.zeros(width, module.in_features, **like) for _ in maps]
            b = [torch.zeros(width, named.outputs, **like) for named in maps]
            blocks = [] if module.lora is None else module.lora.blocks
            module.lora = LoraColumns(
                outs=tuple(named.outputs for named in maps),
                blocks=[*blocks, ColumnBlock(a=a, b=b, owners=owners)],
                slots=self.slots,
            )
        self.owners.append(owners)
        self.version += 1
        return len(self.owners) - 1, 0

    def _clear(self, slot: int) -> None:
        for block, owners in enumerate(self.owners):
            its = (owners == slot).nonzero().flatten().tolist()
            if not its:
                continue
            columns = slice(its[0], its[-1] + 1)
            for named in self.maps.values():
                held = named.module.lora.blocks[block]
                held.a[named.part][columns] = 0
                held.b[named.part][columns] = 0
            owners[columns] = NOBODY
