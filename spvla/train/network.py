"""A model as a training step runs it: with which kernels, and which columns of the logits.

The model acts with whatever adapter is attached to it (flat.py).
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from spvla.errors import UserError
from spvla.model.attention import CAUSAL, Attend
from spvla.model.llama import EAGER, Kernels, KeysValues
from spvla.model.lora import LoraPair
from spvla.model.openvla import OpenVLA


@dataclass(frozen=True, kw_only=True)
class Network:
    """`columns` are those of the logits that are wanted, in float32; the others' weights are not multiplied."""

    model: OpenVLA
    kernels: Kernels = EAGER
    columns: slice = field(default_factory=lambda: slice(None))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocabulary(self) -> int:
        return self.model.config.llm.vocab_size

    def patches(self, pixels: Tensor) -> Tensor:
        """Pixel values (B, 6, 224, 224) -> projected patches (B, 256, D)."""
        return self.model.patches(pixels, self.kernels)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        return self.model.embed(ids)

    def hidden(
        self,
        embeds: Tensor,
        attend: Attend = CAUSAL,
        *,
        positions: Tensor | None = None,
        rows: Tensor | None = None,
        caches: list[KeysValues] | None = None,
    ) -> Tensor:
        """See `OpenVLA.hidden`."""
        kind = {"positions": positions, "rows": rows, "caches": caches}
        return self.model.hidden(embeds, attend, **kind, kernels=self.kernels)

    def step(self, embeds: Tensor, at: Tensor, caches: list[KeysValues]) -> Tensor:
        """One token further: (B, 1, D) -> hidden states (B, 1, D), overwriting row `at` (B,) of the caches."""
        return self.model.language_model.model.step(embeds, at, caches, self.kernels)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), or the columns that are wanted."""
        if self.columns == slice(None):
            return self.model.logits(hidden)
        head = self.model.language_model.lm_head
        rows = head.weight[self.columns].float()
        hidden = hidden.float()
        logits = F.linear(hidden, rows)
        if not isinstance(head.lora, LoraPair):
            return logits
        lora = replace(head.lora, a=head.lora.a.float(), b=head.lora.b[self.columns].float(), outs=(len(rows),))
        return lora.add(hidden, logits)


def require_zeros_beside(network: Network) -> None:
    """Raises UserError where columns of the logits that are left out are not zero."""
    rows = network.model.language_model.lm_head.weight.detach()
    start, end, _ = network.columns.indices(len(rows))
    if rows[:start].any() or rows[end:].any():
        raise UserError(
            "--loss_columns action from a policy whose output head has learnt other words than actions",
            expected="a preset, or a policy that was trained from one with this flag",
            remedy="Leave --loss_columns out.",
        )
