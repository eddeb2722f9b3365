"""OpenVLA-OFT's passes in training: all tokens of a chunk are read in one pass that none of them enters.

So one pass scores the demonstrated chunk and any other, and proposes one: whatever the tokens are, the logits are the
same. A pair costs no more than the demonstration alone.

Legend: B batch, C cameras, T text tokens, L sequence, S slots (chunk x 7), V columns of the logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from spvla.policies.oft.network import OftInputs, OpenVLAOFT, embed_text, reads, visible_keys
from spvla.policies.openvla.prompt import EOS
from spvla.train.blocks import Rows
from spvla.train.network import Loras, Network
from spvla.train.scoring import Inputs, PairLogits, Reply, Speech


class Chunks:
    """A `Family`. R = S + 1: the chunk's tokens and the end of sequence."""

    def __init__(self, network: Network) -> None:
        assert isinstance(network.core, OpenVLAOFT)
        self.network, self.model, self.form = network, network.core, network.core.form
        self.needs = self.form.needs()

    def hidden(self, inputs: Inputs, loras: Loras, *, patches: Tensor | None = None) -> Tensor:
        """What predicts the S slots and the end of sequence: (B, S + 1, D)."""
        patches = self.network.patches(inputs.pixels, loras) if patches is None else patches
        seen = to_chunk_inputs(inputs)
        text = embed_text(self.network.embed, seen.text, seen.start, self.form)
        parts = [patches.view(len(text), -1, patches.shape[-1])]  # (B, 256 C, D)
        if self.model.proprio_projector is not None:
            parts.append(self.model.proprio_projector(seen.proprio.to(text.dtype))[:, None])
        x = torch.cat((text[:, :1], *parts, text[:, 1:]), 1)
        prefix, length = x.shape[1] - text.shape[1], x.shape[1]
        cos, sin = self.network.rotary(torch.arange(length, device=x.device)[None])
        mask = visible_keys(seen, self.form.slots, prefix)[:, None, None]  # the same keys for every query
        rows = Rows(cos=cos, sin=sin, mask=mask, extra=length)
        return self.network.hidden(x, rows, loras, keep=reads(seen, self.form.slots, prefix))

    def score(self, inputs: Inputs, loras: Loras, *, patches: Tensor | None = None) -> Tensor:
        """(B, S + 1, V)."""
        return self.network.logits(self.hidden(inputs, loras, patches=patches), loras)

    def score_pair(
        self, inputs: Inputs, generated: Tensor, loras: Loras, *, patches: Tensor | None = None
    ) -> PairLogits:
        logits = self.score(inputs, loras, patches=patches)
        return PairLogits(real=logits, generated=logits[:, : self.form.slots])

    @torch.no_grad()
    def propose(self, inputs: Inputs, loras: Loras, speech: Speech, uniforms: Tensor) -> Reply:
        """Every token by itself: given what is seen, this policy's tokens are independent."""
        logits = self.score(inputs, loras)[:, : self.form.slots]
        ids = speech.choose(logits.flatten(0, 1), uniforms.flatten()).view(uniforms.shape)
        return Reply(
            generated=ids,
            real_logps=speech.logps(logits, inputs.real),
            generated_logps=speech.logps(logits, ids),
        )


def to_chunk_inputs(inputs: Inputs) -> OftInputs:
    """What the network sees: the end of sequence too, which is a key here, though it stands behind all that is read."""
    text = F.pad(inputs.text, (0, 1))
    stop = inputs.start[:, None] + inputs.real.shape[1]
    text = text.scatter(1, stop, EOS)
    return OftInputs(pixels=inputs.pixels, proprio=inputs.proprio, text=text, start=inputs.start)
