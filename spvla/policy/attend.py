"""Attention of one new token a row against its cached keys and values.

This is bound by reading the cache, once; kernels made for many queries leave most of their tile empty here. So a GPU
gets a small kernel of its own (attend_gpu.py), in which a row's sums have one fixed order, wherever in the batch it
stands; a CPU gets torch's attention with a mask.

Legend: B batch, H heads, S cache slots, K head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_new(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Writes k and v (B, H, 1, K) to slot `at` (B,) of keys and values (B, H, S, K), and attends from q to the slots
    up to there: (B, H, 1, K)."""
    if q.is_cuda and q.shape[-1].bit_count() == 1:  # the kernel's tiles are powers of two
        from spvla.policy.attend_gpu import attend_new as on_gpu

        return on_gpu(q, k, v, keys, values, at)
    rows = torch.arange(len(at), device=at.device)
    keys[rows, :, at] = k[:, :, 0]
    values[rows, :, at] = v[:, :, 0]
    seen = torch.arange(keys.shape[2], device=at.device) <= at[:, None]  # (B, S)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])
