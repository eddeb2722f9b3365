"""OpenVLA-OFT's forward pass (arxiv.org/abs/2502.19645): OpenVLA's modules, every action of a chunk read in one pass.

    [BOS][256 patches of each image][proprio][prompt after BOS][56 slots][stop][padding]
      1         256 C                  0, 1          T - 1          S       1

Slots are zero vectors: no action token ever enters, in training neither. All positions see all others but the padding.
An output is read one position before its slot, as in a causal model: the prompt's last token and the first 55 slots
give the 56 numbers of the chunk (step by step, seven each), and the last slot gives the stop token.

Legend: B batch, C cameras, T text tokens, S slots (chunk x 7 = 56), P patches and proprio, L = P + T, D width,
V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spvla.model.openvla import OpenVLA
from spvla.policies.oft.form import OftForm
from spvla.policies.oft.heads import ActionHead, ProprioProjector


class OftInputs(NamedTuple):
    """A batch on the device."""

    pixels: Tensor  # (B, C, 6, 224, 224)
    proprio: Tensor | None  # (B, 8), normalised
    text: Tensor  # (B, T) int64: BOS, prompt, S ids that are never looked at, stop, padding
    start: Tensor  # (B,) int64: column of the first slot, which is the prompt's length


class OftNetwork(nn.Module):
    """OpenVLA with what its fine-tuned form adds. A checkpoint keeps the three parts in three files."""

    def __init__(self, vla: OpenVLA, form: OftForm) -> None:
        super().__init__()
        self.vla, self.form = vla, form
        width = vla.config.llm.width
        self.proprio_projector = ProprioProjector(width) if form.proprio else None
        self.action_head = ActionHead(width) if form.head == "l1" else None

    @property
    def dtype(self) -> torch.dtype:
        return self.vla.dtype

    @property
    def device(self) -> torch.device:
        return self.vla.device

    def forward(self, inputs: OftInputs) -> Tensor:
        """Hidden states, after the final norm, that predict the S slots and the stop token: (B, S + 1, D)."""
        x = self.embed(inputs)
        prefix = x.shape[1] - inputs.text.shape[1]
        hidden = self.vla.hidden(x, visible_keys(inputs, self.form.slots, prefix)[:, None, None])
        return take_rows(hidden, reads(inputs, self.form.slots, prefix))

    def embed(self, inputs: OftInputs) -> Tensor:
        """(B, L, D)."""
        text = self.vla.embed(inputs.text)
        column = torch.arange(text.shape[1], device=text.device) - inputs.start[:, None]  # 0 at the first slot
        text = text.masked_fill(((column >= 0) & (column < self.form.slots))[..., None], 0)
        parts = [self.vla.patches(inputs.pixels.flatten(0, 1)).unflatten(0, inputs.pixels.shape[:2]).flatten(1, 2)]
        if self.proprio_projector is not None:
            parts.append(self.proprio_projector(inputs.proprio.to(text.dtype))[:, None])
        return torch.cat((text[:, :1], *parts, text[:, 1:]), 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.vla.logits(hidden)


def visible_keys(inputs: OftInputs, slots: int, prefix: int) -> Tensor:
    """(B, L) bool: all but the padding. Every query sees the same."""
    length = prefix + inputs.start + slots + 1
    return torch.arange(prefix + inputs.text.shape[1], device=length.device) < length[:, None]


def reads(inputs: OftInputs, slots: int, prefix: int) -> Tensor:
    """(B, S + 1): the positions before each slot and before the stop token."""
    return prefix + inputs.start[:, None] - 1 + torch.arange(slots + 1, device=inputs.start.device)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, L, D), (B, R) -> (B, R, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
