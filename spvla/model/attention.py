"""Attention where keys and values go into a cache: that of whole prompts, and that of one new token a row.

Prompts come packed, one after another without the padding between them, so that the matrix products before and after
attend to no padding either. One new token is bound by reading the cache, once; kernels made for many queries leave
most of their tile empty there. So a GPU gets kernels of its own for both (attend_gpu.py), in which a row's sums have
one fixed order, wherever in the batch it stands; a CPU gets torch's attention.

Legend: B batch, N tokens of all prompts, H heads, S cache slots a row, K head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos and sin of RoPE's angles, each (..., K)


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
        from spvla.model.kernels import attention as attend_gpu

        return attend_gpu.attend_prompts(q, rope, keys, values, packing.starts)
    padded = torch.zeros_like(keys)
    _tokens(padded)[packing.places] = rotate(q, _turn(rope, keys, packing))
    return _tokens(F.scaled_dot_product_attention(padded, keys, values, is_causal=True))[packing.places]


def keep_prompts(k: Tensor, v: Tensor, rope: Rope, keys: Tensor, values: Tensor, packing: Packing) -> None:
    """Writes packed k (N, H, K), rotated, and v to keys and values (B, H, S, K)."""
    if on_gpu(k):
        from spvla.model.kernels import attention as attend_gpu

        attend_gpu.keep_prompts(k, v, rope, keys, values, packing.places)
        return
    _tokens(keys)[packing.places] = rotate(k, _turn(rope, keys, packing))
    _tokens(values)[packing.places] = v


def _tokens(t: Tensor) -> Tensor:
    """(B, H, S, K) -> (B S, H, K), the same memory where it lies so, as a cache's does."""
    return t.transpose(1, 2).flatten(0, 1)


def _turn(rope: Rope, keys: Tensor, packing: Packing) -> Rope:
    """Each packed token's angles, (N, 1, K)."""
    cos, sin = (t[packing.places % keys.shape[2], None] for t in rope)
    return cos, sin


def attend_new(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Writes k and v (B, H, 1, K) to slot `at` (B,) of keys and values (B, H, S, K), and attends from q to the slots
    up to there: (B, H, 1, K)."""
    if on_gpu(q):
        from spvla.model.kernels import attention as attend_gpu

        return attend_gpu.attend_new(q, k, v, keys, values, at)
    rows = torch.arange(len(at), device=at.device)
    keys[rows, :, at] = k[:, :, 0]
    values[rows, :, at] = v[:, :, 0]
    seen = torch.arange(keys.shape[2], device=at.device) <= at[:, None]  # (B, S)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """(..., K) -> same, each pair (i, i + K / 2) turned by its position's angle (arxiv.org/abs/2104.09864)."""
    cos, sin = rope
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def on_gpu(q: Tensor) -> bool:
    width = q.shape[-1]
    return q.is_cuda and width >= 32 and width.bit_count() == 1  # the kernels' tiles are powers of two
