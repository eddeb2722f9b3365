"""The two halves of a Llama layer around its attention, with a LoRA adapter that is trained: gradients written out.

Between matrix products stand steps bound by memory: adding LoRA's thin product, rotating q and k by their positions,
the gated activation. Left to autograd and a compiler they read and write the same rows several times; here each is one
step (on a GPU one kernel, lora_gpu.py), which takes LoRA's thin product on the way.

    heads      h -> q, k (rotated), v    of adapted q, k, v maps
    gated_mlp  h -> rows                 of adapted gate, up and down maps

Legend: M rows (batch x tokens), D width, F hidden width, r rank, B batch, H heads, T tokens, K head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spvla.model.attention import rotate
from spvla.model.lora import Lora, LoraPair

Three = tuple[Tensor, Tensor, Tensor]


def fits(h: Tensor, *loras: Lora | None, head: int = 16) -> bool:
    """Whether these adapters, and heads of this width, are of the form that is fused."""
    if any(not isinstance(lora, LoraPair) or lora.dropout for lora in loras):
        return False
    sizes = [head, *(lora.b.shape[1] for lora in loras)]
    return not h.is_cuda or all(n >= 16 and n.bit_count() == 1 for n in sizes)  # a GPU's tiles are powers of two


def heads(h: Tensor, weight: Tensor, lora: LoraPair, cos: Tensor, sin: Tensor) -> Three:
    """(B, T, D), and cos, sin (1 or B, T, 1, K) float32 -> q and k rotated, and v, each (B, H, T, K)."""
    return _Heads.apply(h, weight, lora.a, lora.b, lora.scale, cos, sin)


def gated_mlp(h: Tensor, weight: Tensor, lora: LoraPair, down: Tensor, lora_down: LoraPair) -> Tensor:
    """(B, T, D) -> (B, T, D), by the weights of gate and up (2 F, D), and of down (D, F)."""
    trained, trained_down = ((pair.a, pair.b, pair.scale) for pair in (lora, lora_down))
    return _GatedMlp.apply(h, weight, *trained, down, *trained_down)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, cos: Tensor, sin: Tensor
    ) -> Three:
        rows = h.flatten(0, 1)
        narrow = scale * (rows @ a.T)  # (M, 3 r)
        ctx.save_for_backward(rows, narrow, weight, a, b, cos, sin)
        ctx.scale = scale
        return rotary_qkv(rows @ weight.T, narrow, b, cos, sin, len(h))

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        rows, narrow, weight, a, b, cos, sin = ctx.saved_tensors
        dy = rotary_qkv_back(dq, dk, dv, cos, sin)
        d_rows, da, db = _back(dy, rows, narrow, weight, a, b, ctx.scale)
        return d_rows.unflatten(0, (len(dq), -1)), None, da, db, None, None, None


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        *frozen_and_trained: Any,
    ) -> Tensor:
        weight, a, b, scale, down, a_down, b_down, scale_down = frozen_and_trained
        rows = h.flatten(0, 1)
        narrow = scale * (rows @ a.T)  # (M, 2 r)
        gate_up, act = gate(rows @ weight.T, narrow, b)
        narrow_down = scale_down * (act @ a_down.T)  # (M, r)
        ctx.save_for_backward(rows, narrow, gate_up, narrow_down, weight, a, b, down, a_down, b_down)
        ctx.scales = scale, scale_down
        return (act @ down.T + narrow_down @ b_down.T).view(h.shape)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, narrow, gate_up, narrow_down, weight, a, b, down, a_down, b_down = ctx.saved_tensors
        scale, scale_down = ctx.scales
        d = d_out.flatten(0, 1)
        d_narrow = scale_down * (d @ b_down)
        d_gate_up, act = gate_back(d @ down, d_narrow, a_down, gate_up)
        d_rows, da, db = _back(d_gate_up, rows, narrow, weight, a, b, scale)
        return d_rows.view(d_out.shape), None, da, db, None, None, d_narrow.T @ act, d.T @ narrow_down, None


def _back(
    dy: Tensor, rows: Tensor, narrow: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows (M, D), a (n r, D) and b (n out, r) of n maps side by side: y = rows W' + narrow spread(b)'."""
    n, rank = len(a) // b.shape[1], b.shape[1]
    d_narrow = scale * (dy @ torch.block_diag(*b.chunk(n)))  # (M, n r)
    every = dy.T @ narrow  # (n out, n r), of which the diagonal blocks count
    db = torch.cat([part[:, i * rank : (i + 1) * rank] for i, part in enumerate(every.chunk(n))])
    return dy @ weight + d_narrow @ a, d_narrow.T @ rows, db


@torch.library.custom_op("spvla::gate", mutates_args=())
def gate(y: Tensor, narrow: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """y (M, 2 F), narrow (M, 2 r), b (2 F, r) -> gate and up (M, 2 F), and silu(gate) up (M, F)."""
    if y.is_cuda:
        from spvla.model.kernels import lora_gpu

        return lora_gpu.gate(y, narrow, b)
    y = y + narrow @ torch.block_diag(*b.chunk(2)).T
    left, right = y.chunk(2, -1)
    return y, F.silu(left) * right


@gate.register_fake
def _(y: Tensor, narrow: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), y.new_empty(len(y), y.shape[1] // 2)


@torch.library.custom_op("spvla::gate_back", mutates_args=())
def gate_back(d_act: Tensor, narrow: Tensor, a: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `gate`'s y, and the activation anew.

    d_act (M, F) lacks the part that comes back through LoRA, narrow (M, r) times a (r, F).
    """
    if d_act.is_cuda:
        from spvla.model.kernels import lora_gpu

        return lora_gpu.gate_back(d_act, narrow, a, gate_up)
    d = d_act + narrow @ a
    left, right = gate_up.chunk(2, -1)
    sigmoid = left.sigmoid()
    silu = left * sigmoid
    return torch.cat((d * right * (sigmoid + silu * (1 - sigmoid)), d * silu), -1), silu * right


@gate_back.register_fake
def _(d_act: Tensor, narrow: Tensor, a: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate_up), torch.empty_like(d_act)


@torch.library.custom_op("spvla::rotary_qkv", mutates_args=())
def rotary_qkv(y: Tensor, narrow: Tensor, b: Tensor, cos: Tensor, sin: Tensor, batch: int) -> Three:
    """y (M, 3 D), narrow (M, 3 r), b (3 D, r) -> q, k, v (B, H, T, K), q and k rotated (arxiv.org/abs/2104.09864)."""
    if y.is_cuda:
        from spvla.model.kernels import lora_gpu

        return lora_gpu.rotary_qkv(y, narrow, b, cos, sin, batch)
    y = y + narrow @ torch.block_diag(*b.chunk(3)).T
    q, k, v = y.view(batch, len(y) // batch, 3, -1, cos.shape[-1]).unbind(2)  # each (B, T, H, K)
    q, k = (rotate(t, (cos, sin)) for t in (q, k))
    return tuple(t.transpose(1, 2).contiguous() for t in (q, k, v))


@rotary_qkv.register_fake
def _(y: Tensor, narrow: Tensor, b: Tensor, cos: Tensor, sin: Tensor, batch: int) -> Three:
    head = cos.shape[-1]
    shape = (batch, y.shape[1] // 3 // head, len(y) // batch, head)
    return y.new_empty(shape), y.new_empty(shape), y.new_empty(shape)


@torch.library.custom_op("spvla::rotary_qkv_back", mutates_args=())
def rotary_qkv_back(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients of `rotary_qkv`'s q, k, v (B, H, T, K) -> that of its y (M, 3 D)."""
    if dq.is_cuda:
        from spvla.model.kernels import lora_gpu

        return lora_gpu.rotary_qkv_back(dq, dk, dv, cos, sin)
    dq, dk, dv = (d.transpose(1, 2) for d in (dq, dk, dv))  # each (B, T, H, K)
    dq, dk = (rotate(d, (cos, -sin)) for d in (dq, dk))
    return torch.stack((dq, dk, dv), 2).flatten(2).flatten(0, 1)


@rotary_qkv_back.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, head = dq.shape
    return dq.new_empty(batch * tokens, 3 * heads * head)
