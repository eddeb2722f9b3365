"""OpenVLA-OFT's passes in training: all tokens of a chunk are read in one pass that none of them enters.

So one pass scores the demonstrated chunk and any other, and proposes one: whatever the tokens are, the logits are the
same. A pair costs no more than the demonstration alone.

Legend: B batch, C cameras, T text tokens, L sequence, S slots (chunk x 7), V columns of the logits, K chunk,
A action dims (7).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from spvla.model.attention import Masked
from spvla.policies.oft.network import OftInputs, OpenVLAOFT, embed_text, reads, visible_keys
from spvla.policies.openvla.prompt import EOS
from spvla.train.network import Network
from spvla.train.scoring import Inputs, PairLogits, ReferenceOutput, TokenSampler


class Chunks:
    """The discrete form's `Family`. R = S + 1: the chunk's tokens and the end of sequence."""

    regresses = False

    def __init__(self, network: Network) -> None:
        assert isinstance(network.model, OpenVLAOFT)
        self.network, self.model, self.form = network, network.model, network.model.form
        self.needs = self.form.needs()

    def hidden(self, inputs: Inputs, *, patches: Tensor | None = None) -> Tensor:
        """What predicts the S slots and the end of sequence: (B, S + 1, D)."""
        patches = self.network.patches(inputs.pixels) if patches is None else patches
        seen = to_chunk_inputs(inputs)
        text = embed_text(self.network.embed, seen.text, seen.start, self.form)
        parts = [patches.view(len(text), -1, patches.shape[-1])]  # (B, 256 C, D)
        if self.model.proprio_projector is not None:
            parts.append(self.model.proprio_projector(seen.proprio.to(text.dtype))[:, None])
        x = torch.cat((text[:, :1], *parts, text[:, 1:]), 1)
        prefix = x.shape[1] - text.shape[1]
        attend = Masked(visible_keys(seen, self.form.slots, prefix)[:, None, None])  # the same keys for every query
        return self.network.hidden(x, attend, rows=reads(seen, self.form.slots, prefix))

    def score(self, inputs: Inputs, *, patches: Tensor | None = None) -> Tensor:
        """(B, S + 1, V)."""
        return self.network.logits(self.hidden(inputs, patches=patches))

    def score_pair(self, inputs: Inputs, generated: Tensor, *, patches: Tensor | None = None) -> PairLogits:
        logits = self.score(inputs, patches=patches)
        return PairLogits(real=logits, generated=logits[:, : self.form.slots])

    @torch.no_grad()
    def propose(self, inputs: Inputs, sampler: TokenSampler, uniforms: Tensor) -> ReferenceOutput:
        """Every token by itself: given what is seen, this policy's tokens are independent."""
        logits = self.score(inputs)[:, : self.form.slots]
        ids = sampler.choose(logits.flatten(0, 1), uniforms.flatten()).view(uniforms.shape)
        return ReferenceOutput(
            generated=ids,
            real_logps=sampler.logps(logits, inputs.real),
            generated_logps=sampler.logps(logits, ids),
        )


class RegressedChunks(Chunks):
    """The L1 form's `Family`: numbers instead of tokens. There is nothing to draw from (docs/theory.md)."""

    regresses = True

    def regress(self, inputs: Inputs, *, patches: Tensor | None = None) -> Tensor:
        """Normalised actions (B, K, A) float32."""
        return self.model.action_head(self.hidden(inputs, patches=patches)[:, : self.form.slots]).float()


def to_chunk_inputs(inputs: Inputs) -> OftInputs:
    """What the network sees: the end of sequence too, which is a key here, though it stands behind all that is read."""
    text = F.pad(inputs.text, (0, 1))
    stop = inputs.start[:, None] + inputs.real.shape[1]
    text = text.scatter(1, stop, EOS)
    return OftInputs(pixels=inputs.pixels, proprio=inputs.proprio, text=text, start=inputs.start)


def chunks_of(network: Network) -> Chunks:
    """By the form of the model's head."""
    return RegressedChunks(network) if network.model.action_head is not None else Chunks(network)
