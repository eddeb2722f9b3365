"""Halves of a Llama layer, and blocks of the towers: pure functions of tensors, weights and adapters included.

So torch.compile compiles each once for each shape and uses it for all layers.

Legend: B batch, T rows, D width, H heads, K head width, Q rows under a mask of their own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spvla.train import fused
from spvla.train.adapters import Lora, Site, adapted
from spvla.train.fused import turned


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    eps: float


class Rows(NamedTuple):
    """Where each row stands. `extra` rows at the end see only what `mask` allows; all others are causal."""

    cos: Tensor  # (1 or B, T, 1, K) float32
    sin: Tensor
    mask: Tensor | None  # (B, 1, extra, T)
    extra: int


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    wide = x.float()
    return norm.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).to(x.dtype)


def project_qkv(x: Tensor, norm: Norm, site: Site, lora: Lora | None, heads: int, rows: Rows) -> tuple[Tensor, ...]:
    """(B, T, D) -> turned q and k, and v, each (B, H, T, K)."""
    h = rms_norm(x, norm)
    if fused.fits(h, lora, head=rows.cos.shape[-1]):
        return fused.heads(h, site, lora, rows.cos, rows.sin)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in adapted(h, site, lora).split(site.outs, -1))
    return turned(q, rows.cos, rows.sin), turned(k, rows.cos, rows.sin), v.transpose(1, 2).contiguous()


def llama_attention(
    x: Tensor, norm: Norm, site: Site, lora: Lora | None, heads: int, rows: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of a layer, without its output map: (B, T, D) -> (B, T, D), and k, v (B, H, T, K)."""
    q, k, v = project_qkv(x, norm, site, lora, heads, rows)
    plain = x.shape[1] - rows.extra
    if not plain:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=rows.mask)
        return out.transpose(1, 2).flatten(2), k, v
    out = F.scaled_dot_product_attention(q[:, :, :plain], k[:, :, :plain], v[:, :, :plain], is_causal=True)
    if rows.mask is not None:
        out = torch.cat((out, F.scaled_dot_product_attention(q[:, :, plain:], k, v, attn_mask=rows.mask)), 2)
    return out.transpose(1, 2).flatten(2), k, v


def llama_rest(x: Tensor, attended: Tensor, norm: Norm, sites: Sequence[Site], loras: Sequence[Lora | None]) -> Tensor:
    """Output map, residual, gated MLP: (B, T, D) twice -> (B, T, D)."""
    x = x + adapted(attended, sites[0], loras[0])
    h = rms_norm(x, norm)
    if fused.fits(h, *loras[1:]):
        return x + fused.gated_mlp(h, sites[1], loras[1], sites[2], loras[2])
    gate, up = adapted(h, sites[1], loras[1]).chunk(2, -1)
    return x + adapted(F.silu(gate) * up, sites[2], loras[2])


def vit_block(
    x: Tensor,
    norms: Sequence[Norm],
    sites: Sequence[Site],
    loras: Sequence[Lora | None],
    scales: Sequence[Tensor | None],
    heads: int,
) -> Tensor:
    """One pre-norm transformer block of a tower: (B, T, D) -> (B, T, D). `scales` is DINOv2's LayerScale."""
    h = F.layer_norm(x, x.shape[-1:], norms[0].weight, norms[0].bias, norms[0].eps)
    q, k, v = adapted(h, sites[0], loras[0]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + _scaled(adapted(h, sites[1], loras[1]), scales[0])
    h = F.layer_norm(x, x.shape[-1:], norms[1].weight, norms[1].bias, norms[1].eps)
    h = adapted(h, sites[2]._replace(bias=None), loras[2]) + sites[2].bias  # as in policy.linear: see `product`
    h = adapted(F.gelu(h), sites[3], loras[3])
    return x + _scaled(h, scales[1])


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def project(x: Tensor, sites: Sequence[Site], loras: Sequence[Lora | None]) -> Tensor:
    """Vision features -> Llama's width: (B, 256, dino + siglip) -> (B, 256, D)."""
    h = F.gelu(adapted(x, sites[0], loras[0]))
    return adapted(F.gelu(adapted(h, sites[1], loras[1])), sites[2], loras[2])
