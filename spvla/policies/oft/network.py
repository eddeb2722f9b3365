"""OpenVLA-OFT's forward pass (arxiv.org/abs/2502.19645): OpenVLA's modules, every action of a chunk read in one pass.

    [BOS][256 patches of each image][proprio][prompt after BOS][56 slots][stop][padding]
      1         256 C                  0, 1          T - 1          S       1

Slots are zero vectors (or learned ones): no action token ever enters, in training neither. All positions see all
others but the padding. An output is read one position before its slot, as in a causal model: the prompt's last token
and the first 55 slots give the 56 numbers of the chunk (step by step, seven each), and the last slot the stop token.

Legend: B batch, C cameras, T text tokens, S slots (chunk x 7 = 56), P patches and proprio, L = P + T, D width,
V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvla.model.attention import Masked
from spvla.model.llama import EAGER, Kernels
from spvla.model.lora_bank import RowSlots
from spvla.model.openvla import OpenVLA, OpenVLAConfig
from spvla.policies.oft.form import OftForm
from spvla.policies.oft.heads import ActionHead, ProprioProjector, make_added
from spvla.policies.openvla.actions import ACTION_TOKEN_BEGIN, VOCAB_SIZE

FIRST_ACTION = ACTION_TOKEN_BEGIN + 1  # 31744; the last of the 256 is VOCAB_SIZE - 1

PLAIN_PARTS = ("vision_backbone", "projector", "language_model")


class OftInputs(NamedTuple):
    """A batch on the device."""

    pixels: Tensor  # (B, C, 6, 224, 224)
    proprio: Tensor | None  # (B, 8), normalised
    text: Tensor  # (B, T) int64: BOS, prompt, S ids that are never looked at, stop, padding
    start: Tensor  # (B,) int64: column of the first slot, which is the prompt's length


class OpenVLAOFT(OpenVLA):
    """OpenVLA with what its fine-tuned form adds. A checkpoint keeps the added parts in files of their own."""

    def __init__(self, config: OpenVLAConfig, form: OftForm) -> None:
        super().__init__(config)
        self.form = form
        self.proprio_projector = ProprioProjector(config.llm.width) if form.proprio else None
        self.action_head = ActionHead(config.llm.width) if form.head == "l1" else None
        self.versions: dict[int, nn.ModuleDict] = {}  # resident adapters' own of the two, by slot
        self.row_slots = RowSlots()  # which slot each row of the coming batch uses

    @property
    def first_token(self) -> int:
        """Id of the logits' first column."""
        return FIRST_ACTION if self.form.action_tokens_only else 0

    @classmethod
    def around(cls, vla: OpenVLA, form: OftForm, *, seed: int = 0) -> "OpenVLAOFT":
        """The same towers, projector and Llama, and what the form adds, at random weights."""
        with torch.device("meta"):
            model = cls(vla.config, form)
        for name in PLAIN_PARTS:
            setattr(model, name, getattr(vla, name))
        for name, module in make_added(form, vla.config.llm.width, seed=seed).items():
            setattr(model, name, module.to(vla.device, vla.dtype))
        return model

    def added(self) -> dict[str, nn.Module]:
        """What the form adds, by the names of a checkpoint's files."""
        named = {"action_head": self.action_head, "proprio_projector": self.proprio_projector}
        return {name: module for name, module in named.items() if module is not None}

    def keep_version(self, slot: int, version: nn.ModuleDict) -> None:
        """Makes head and projector those of a resident adapter's slot: in the memory of the one that had it before,
        which recorded passes read."""
        if slot in self.versions:
            self.versions[slot].load_state_dict(version.state_dict())
        else:
            self.versions[slot] = version.to(self.device, self.dtype).eval().requires_grad_(False)

    def plain(self) -> OpenVLA:
        """The same towers, projector and Llama without the rest: the part that a checkpoint keeps as OpenVLA does."""
        with torch.device("meta"):
            vla = OpenVLA(self.config)
        for name in PLAIN_PARTS:
            setattr(vla, name, getattr(self, name))
        return vla

    def predict(self, inputs: OftInputs, kernels: Kernels = EAGER) -> Tensor:
        """Hidden states, after the final norm, that predict the S slots and the stop token: (B, S + 1, D)."""
        x = self.sequence(inputs, kernels)
        prefix = x.shape[1] - inputs.text.shape[1]
        attend = Masked(visible_keys(inputs, self.form.slots, prefix)[:, None, None])
        return self.hidden(x, attend, rows=reads(inputs, self.form.slots, prefix), kernels=kernels)

    def sequence(self, inputs: OftInputs, kernels: Kernels = EAGER) -> Tensor:
        """(B, L, D)."""
        text = embed_text(self.embed, inputs.text, inputs.start, self.form)
        parts = [self._image_patches(inputs.pixels, kernels)]
        if self.proprio_projector is not None:
            parts.append(self._own("proprio_projector", inputs.proprio.to(text.dtype))[:, None])
        return torch.cat((text[:, :1], *parts, text[:, 1:]), 1)

    def _image_patches(self, pixels: Tensor, kernels: Kernels) -> Tensor:
        """(B, C, 6, 224, 224) -> (B, 256 C, D); each of a row's images by the row's resident adapter."""
        slots = self.row_slots.slots
        self.row_slots.slots = slots.repeat_interleave(pixels.shape[1])
        patches = self.patches(pixels.flatten(0, 1), kernels).unflatten(0, pixels.shape[:2]).flatten(1, 2)
        self.row_slots.slots = slots
        return patches

    def token_logits(self, hidden: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, V); where the form has action tokens alone, of those 256, in float32: in bfloat16
        neighbouring bins often tie, and all ties would go to the same side."""
        if not self.form.action_tokens_only:
            return self.logits(hidden)
        head, actions = self.language_model.lm_head, slice(FIRST_ACTION, VOCAB_SIZE)
        logits = F.linear(hidden.float(), head.weight[actions].float())
        if head.lora is None:
            return logits
        added = head.lora.add(hidden, hidden.new_zeros(*hidden.shape[:-1], head.out_features))
        return logits + added[..., actions].float()

    def actions(self, hidden: Tensor) -> Tensor:
        """Hidden states of the slots (B, S, D) -> normalised actions (B, K, A)."""
        return self._own("action_head", hidden)

    def _own(self, part: str, x: Tensor) -> Tensor:
        """Head or projector, each row by its resident adapter's own. All run on all rows, so that no bit of a result
        depends on what the other rows ask for."""
        y = getattr(self, part)(x)
        for slot, version in self.versions.items():
            asked = (self.row_slots.slots == slot).view(-1, *[1] * (y.dim() - 1))
            y = torch.where(asked, version[part](x), y)
        return y


def embed_text(embed: Callable[[Tensor], Tensor], text: Tensor, start: Tensor, form: OftForm) -> Tensor:
    """Ids (B, T), and the column of the first slot (B,) -> (B, T, D).

    A slot is a zero vector, or has its own row of the embedding: those of action tokens, which are never an input.
    """
    column = torch.arange(text.shape[1], device=text.device) - start[:, None]  # (B, T), 0 at the first slot
    is_slot = (column >= 0) & (column < form.slots)
    if form.learned_slots:
        return embed(torch.where(is_slot, FIRST_ACTION + column, text))
    return embed(text).masked_fill(is_slot[..., None], 0)


def visible_keys(inputs: OftInputs, slots: int, prefix: int) -> Tensor:
    """(B, L) bool: all but the padding. Every query sees the same."""
    length = prefix + inputs.start + slots + 1
    return torch.arange(prefix + inputs.text.shape[1], device=length.device) < length[:, None]


def reads(inputs: OftInputs, slots: int, prefix: int) -> Tensor:
    """(B, S + 1): the positions before each slot and before the stop token."""
    return prefix + inputs.start[:, None] - 1 + torch.arange(slots + 1, device=inputs.start.device)
