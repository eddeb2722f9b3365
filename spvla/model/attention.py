"""Attention, in the forms that OpenVLA's passes need. What a layer does before and after it is the same in all.

A pass over whole sequences is handed one of
    Causal        each token sees those before it and itself
    Masked        all see what a mask allows, or all: one pass over a chunk of actions is bidirectional
    SharedPrefix  two continuations of one prefix in one sequence, blind to each other
Decoding keeps keys and values in a cache:
    attend_prompts  prompts, packed one after another without the padding between them, so that the matrix products
                    before and after attend to no padding either
    attend_new      one new token a row. It is bound by reading the cache, once; kernels made for many queries leave
                    most of their tile empty there.
So a GPU gets kernels of its own for those two (kernels/attention.py), in which a row's sums have one fixed order,
wherever in the batch it stands; a CPU gets torch's attention.

Queries and keys are rotated by their positions' angles in float32, in training and in decoding.

Legend: B batch, T tokens, N tokens of all prompts, H heads, S cache slots a row, K head width, E rows at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos and sin of RoPE's angles, float32, each (1 or B, T, 1, K)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, H, T, K), q and k rotated -> (B, T, H K)


@dataclass(frozen=True)
class Causal:
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _side_by_side(F.scaled_dot_product_attention(q, k, v, is_causal=True))


@dataclass(frozen=True)
class Masked:
    """mask: broadcasts to (B, H, T, T); bool (True attends) or added to the scores. None: all tokens see all."""

    mask: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _side_by_side(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask))


@dataclass(frozen=True)
class SharedPrefix:
    """Causal, which is the fastest attention there is, but for E rows at the end, which see what `mask` allows."""

    mask: Tensor  # (B, 1, E, T) bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plain = q.shape[2] - self.mask.shape[2]
        out = F.scaled_dot_product_attention(q[:, :, :plain], k[:, :, :plain], v[:, :, :plain], is_causal=True)
        last = F.scaled_dot_product_attention(q[:, :, plain:], k, v, attn_mask=self.mask)
        return _side_by_side(torch.cat((out, last), 2))


CAUSAL = Causal()


def _side_by_side(heads: Tensor) -> Tensor:
    """(B, H, T, K) -> (B, T, H K)."""
    return heads.transpose(1, 2).flatten(2)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the tokens of B packed prompts stand."""

    starts: Tensor  # (B + 1,) int32: of each prompt among the N tokens, and the end of the last
    places: Tensor  # (N,) int64: each token's slot among the B x S of the cache, b S + t for token t of prompt b


def attend_prompts(
    q: Tensor, k: Tensor, v: Tensor, rope: Rope, keys: Tensor, values: Tensor, packing: Packing
) -> Tensor:
    """Packed q, k, v (N, H, K), not yet rotated -> (N, H, K), each prompt attending to itself, causally.

    Writes rotated k, and v, to keys and values (B, H, S, K). rope: of the positions 0 to S - 1, each (S, K).
    """
    keep_prompts(k, v, rope, keys, values, packing)
    if on_gpu(q):
        from spvla.model.kernels import attention as gpu

        return gpu.attend_prompts(q, rope, keys, values, packing.starts)
    padded = torch.zeros_like(keys)
    _tokens(padded)[packing.places] = rotate(q, _angles(rope, keys, packing))
    return _tokens(F.scaled_dot_product_attention(padded, keys, values, is_causal=True))[packing.places]


def keep_prompts(k: Tensor, v: Tensor, rope: Rope, keys: Tensor, values: Tensor, packing: Packing) -> None:
    """Writes packed k (N, H, K), rotated, and v to keys and values (B, H, S, K)."""
    if on_gpu(k):
        from spvla.model.kernels import attention as gpu

        gpu.keep_prompts(k, v, rope, keys, values, packing.places)
        return
    _tokens(keys)[packing.places] = rotate(k, _angles(rope, keys, packing))
    _tokens(values)[packing.places] = v


def _tokens(t: Tensor) -> Tensor:
    """(B, H, S, K) -> (B S, H, K), the same memory where it lies so, as a cache's does."""
    return t.transpose(1, 2).flatten(0, 1)


def _angles(rope: Rope, keys: Tensor, packing: Packing) -> Rope:
    """Each packed token's, (N, 1, K)."""
    cos, sin = (t[packing.places % keys.shape[2], None] for t in rope)
    return cos, sin


def attend_new(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Writes k and v (B, H, 1, K) to slot `at` (B,) of keys and values (B, H, S, K), and attends from q to the slots
    up to there: (B, H, 1, K)."""
    if on_gpu(q):
        from spvla.model.kernels import attention as gpu

        return gpu.attend_new(q, k, v, keys, values, at)
    rows = torch.arange(len(at), device=at.device)
    keys[rows, :, at] = k[:, :, 0]
    values[rows, :, at] = v[:, :, 0]
    seen = torch.arange(keys.shape[2], device=at.device) <= at[:, None]  # (B, S)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])


def rotary(positions: Tensor, width: int, theta: float) -> Rope:
    """Positions (B, T) -> cos and sin (B, T, 1, width) of RoPE's angles (arxiv.org/abs/2104.09864)."""
    exponents = torch.arange(0, width, 2, device=positions.device).float() / width
    angles = positions[..., None].float() * theta**-exponents
    angles = torch.cat((angles, angles), -1)[:, :, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """(B, T, H, K) -> same, each pair (i, i + K / 2) rotated by its position's angle, in float32."""
    cos, sin = rope
    left, right = x.chunk(2, -1)
    return (x * cos + torch.cat((-right, left), -1) * sin).to(x.dtype)


def on_gpu(q: Tensor) -> bool:
    width = q.shape[-1]
    return q.is_cuda and width >= 32 and width.bit_count() == 1  # the kernels' tiles are powers of two
