"""Both actions scored in one pass, and the forms of what goes in and comes out.

One pass lays out, for each sample,
    BOS | 256 patches | prompt, real action, end, padding | first six generated tokens
Real and generated follow the same prefix without seeing each other (attention.SharedPrefix), so the prefix is computed
once. The generated tokens' positions restart where the real action begins. The seventh is predicted and never fed.
Padding, on the right, needs no mask. The model acts with the adapter that is attached to it.

Legend: B batch, T text tokens, L rows before the generated ones (256 + T), A action dims (7), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from spvla.model.attention import SharedPrefix
from spvla.model.llama import KeysValues
from spvla.model.openvla import with_patches
from spvla.model.sampling import draw
from spvla.model.transfer import to_device
from spvla.model.vision import NUM_PATCHES
from spvla.policies.openvla.augmentation import augment_on_device
from spvla.policies.openvla.images import to_pixel_values
from spvla.train.losses import cap_logits, token_logps
from spvla.train.network import Network
from spvla.types import ACTION_DIM, Batch

REAL_ROWS = ACTION_DIM + 1  # seven action tokens and the end of sequence
FED = ACTION_DIM - 1  # generated tokens that are fed back


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A batch on the device."""

    pixels: Tensor  # (B C, 6, 224, 224) float32, the C cameras of a sample one after another
    text: Tensor  # (B, T) int64: the batch's ids without the last column, which predicts nothing
    start: Tensor  # (B,) column of the first action token
    targets: Tensor  # (B, R) what has a loss: the real action's A tokens, and the end of sequence
    real: Tensor  # (B, A) the real action's tokens
    proprio: Tensor | None = None  # (B, 8) float32, normalised
    actions: Tensor | None = None  # (B, K, 7) float32, normalised: what a regressing head is to say

    @property
    def first(self) -> Tensor:
        """(B,) row that predicts the first action token."""
        return NUM_PATCHES + self.start - 1


def to_inputs(batch: Batch, device: torch.device | str, *, width: int = 0) -> Inputs:
    """Moves a batch to the device, its text padded to `width` tokens at least."""
    ids, tokens = batch.input_ids, batch.actions[0].size
    start = batch.lengths - tokens - 1
    targets = _to(np.take_along_axis(ids, start[:, None] + np.arange(tokens + 1), 1), device)
    text = np.zeros((len(ids), max(ids.shape[1], width) - 1), np.int64)  # what pads is never seen: attention is causal
    text[:, : ids.shape[1] - 1] = ids[:, :-1]
    images = _to(batch.images.reshape(-1, *batch.images.shape[-3:]), device)
    if batch.augmentation is not None:
        images = augment_on_device(images, _to(batch.augmentation.reshape(len(images), -1), device))
    return Inputs(
        pixels=to_pixel_values(images),
        text=_to(text, device),
        start=_to(start, device),
        targets=targets,
        real=targets[:, :tokens],
        proprio=None if batch.proprio is None else _to(batch.proprio, device),
        actions=_to(batch.actions, device),
    )


def join(parts: Sequence[Inputs]) -> Inputs:
    """Inputs of one width as one."""
    whole = {f.name: [getattr(x, f.name) for x in parts] for f in fields(Inputs)}
    return Inputs(**{name: None if values[0] is None else torch.cat(values) for name, values in whole.items()})


def _to(array: np.ndarray, device: torch.device | str) -> Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)


@dataclass(frozen=True, kw_only=True)
class PairLogits:
    real: Tensor  # (B, A + 1, V) predicts the real action and the end of sequence
    generated: Tensor  # (B, A, V) predicts the generated action


def score_real(
    network: Network, inputs: Inputs, *, caches: list[KeysValues] | None = None, patches: Tensor | None = None
) -> Tensor:
    """Logits of the real action and the end of sequence: (B, A + 1, V). `patches` are the images' if known.

    caches: an empty list, which gets each layer's keys and values.
    """
    x = _prefix_and_real(network, inputs, patches)
    rows = inputs.first[:, None] + torch.arange(REAL_ROWS, device=x.device)
    return network.logits(network.hidden(x, rows=rows, caches=caches))


def score_pair(network: Network, inputs: Inputs, generated: Tensor, *, patches: Tensor | None = None) -> PairLogits:
    """Logits of both actions in one pass; `generated` is (B, A). `patches` are the images' if known."""
    x = torch.cat((_prefix_and_real(network, inputs, patches), network.embed(generated[:, :FED])), 1)
    attend, positions = shared_prefix(inputs.first, length=x.shape[1] - FED)
    steps = torch.arange(REAL_ROWS, device=x.device)
    rows = torch.cat((inputs.first[:, None] + steps, (x.shape[1] - FED + steps[:FED]).expand(len(x), -1)), 1)
    logits = network.logits(network.hidden(x, attend, positions=positions, rows=rows))
    real, after = logits.split((REAL_ROWS, FED), 1)
    return PairLogits(real=real, generated=torch.cat((real[:, :1], after), 1))  # both first tokens: one prediction


def shared_prefix(first: Tensor, *, length: int) -> tuple[SharedPrefix, Tensor]:
    """Attention and positions (B, L + 6) of one pass over a pair: the generated tokens go on from row `first` (B,)."""
    steps = torch.arange(FED, device=first.device)
    plain = torch.arange(length, device=first.device).expand(len(first), -1)
    column = torch.arange(length + FED, device=first.device)
    prefix = column <= first[:, None, None]  # (B, 1, L + 6)
    own = (column >= length) & (column - length <= steps[:, None])  # (6, L + 6)
    return SharedPrefix((prefix | own)[:, None]), torch.cat((plain, first[:, None] + 1 + steps), 1)


def _prefix_and_real(network: Network, inputs: Inputs, patches: Tensor | None) -> Tensor:
    """(B, L, D): BOS, patches, text."""
    return with_patches(network.embed(inputs.text), network.patches(inputs.pixels) if patches is None else patches)


@dataclass(frozen=True, kw_only=True)
class ReferenceOutput:
    """What the opponent answered to each sample, and how probable it finds both actions. No gradient."""

    generated: Tensor  # (B, A) int64
    real_logps: Tensor  # (B, A)
    generated_logps: Tensor  # (B, A)


def split(output: ReferenceOutput, sizes: Sequence[int]) -> list[ReferenceOutput]:
    """The answers to the first `sizes[0]` samples, to the next `sizes[1]`, and so on."""
    ends = np.cumsum(sizes)
    return [
        ReferenceOutput(**{f.name: getattr(output, f.name)[end - size : end] for f in fields(ReferenceOutput)})
        for size, end in zip(sizes, ends, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class TokenSampler:
    """How actions are drawn and log-probs taken."""

    temperature: float = 0.0  # 0: greedy
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def logps(self, logits: Tensor, ids: Tensor) -> Tensor:
        return token_logps(cap_logits(logits.float(), self.logit_softcap), ids, scale=self.logit_scale)

    def greedy(self, logits: Tensor) -> Tensor:
        """Log-prob of each position's most likely token."""
        return self.logps(logits, logits.argmax(-1))

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Logits (B, V), numbers (B,) in [0, 1) that decide what is sampled -> ids (B,)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return draw(cap_logits(logits.float(), self.logit_softcap), self.temperature, uniform)


def draw_uniforms(seed: int, visit: int, samples: np.ndarray, tokens: int = ACTION_DIM) -> np.ndarray:
    """(B,) sample numbers -> (B, A) float64 in [0, 1), the same for a sample whoever shares its batch."""
    rows = [np.random.default_rng((seed, visit, int(s))).random(tokens) for s in samples]
    return np.stack(rows)
