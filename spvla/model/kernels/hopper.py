"""Steps of a layer on a Hopper GPU whose matrix products finish the work before they write.

Compiled by torch, gate and up are written side by side for another kernel to read again; here only silu(gate) * up
leaves the card's registers. The products of the towers' blocks take bias, GELU, LayerScale and residual with them in
the same way. They are quack's (github.com/Dao-AILab/quack), which takes the end of a product as a Python function of
one element. A row's bits do not depend on how many rows are beside it.

Steps of few rows go the compiled way. So do products that have nothing to finish or only a sum in place: cuBLAS's are
as quick. A row with a resident adapter goes the compiled way too, because its sums come before what is finished here;
beside such rows the base's are computed both ways, so that they keep the bits that they have alone.

Legend: B images, T tokens of each, N rows, D width, F hidden width, H heads.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from quack.activation import gelu_erf, swiglu
from quack.epilogue.frontend import EpiMod, gemm_epilogue
from quack.epilogue.math import unpack
from quack.epilogue.ops import RowVecLoad
from quack.gemm_config import GemmConfig
from torch import Tensor, nn

from spvla.model.linear import Linear
from spvla.model.llama import Kernels, LlamaLayer, RmsNorm
from spvla.model.lora_bank import LoraColumns
from spvla.model.vision import LayerScale, VisionBlock

LEAST = 1024  # rows; with fewer, the reading of the weights takes the time


def _tiles(columns: int) -> GemmConfig:
    """128 rows by so many columns, two tiles in turn on a multiprocessor: one multiplies while the other finishes."""
    turns = {"pingpong": True, "cluster_m": 2, "cluster_n": 1, "is_dynamic_persistent": False}
    return GemmConfig(tile_m=128, tile_n=columns, device_capacity=9, **turns)


TILES = [_tiles(columns) for columns in (192, 160, 128)]


@gemm_epilogue(outputs=("out",), mode="acc_pair")
def _gate(acc):
    gate, up = unpack(acc)
    return {"out": swiglu(gate, up)}


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def _bias(acc, bias):
    return {"D": acc + bias}


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def _gelu(acc, bias):
    return {"D": gelu_erf(acc + bias)}


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def _residual(acc, c, bias):
    return {"D": c + (acc + bias)}


@gemm_epilogue(ops={"bias": RowVecLoad("bias"), "scale": RowVecLoad("scale")})
def _scaled_residual(acc, c, bias, scale):
    return {"D": c + (acc + bias) * scale}


def gated(x: Tensor, gate_up: Tensor) -> Tensor:
    """silu(x gate) * (x up): (N, D), the weights of gate and then up (2 F, D) -> (N, F)."""
    return _gate(x, gate_up.T, store_d=False, concat_layout=("B",), config=TILES[0], tuned=False)["out"]


def run_block(block: VisionBlock, x: Tensor) -> Tensor:
    """A tower's block, (B, T, D) -> (B, T, D)."""
    attn, mlp = block.attn, block.mlp
    rows = x.reshape(-1, x.shape[-1])  # (N, D)
    qkv = _product(_bias, layer_norm(block.norm1, rows), attn.qkv).view(*x.shape[:2], 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D / H)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows.shape)
    rows = _add(rows, attended, attn.proj, block.ls1)
    rows = _add(rows, _product(_gelu, layer_norm(block.norm2, rows), mlp.fc1), mlp.fc2, block.ls2)
    return rows.view(x.shape)


def _add(rows: Tensor, inner: Tensor, linear: Linear, scale: nn.Module) -> Tensor:
    if isinstance(scale, LayerScale):
        return _product(_scaled_residual, inner, linear, rows, scale=scale.scale_factor)
    return _product(_residual, inner, linear, rows)


def _product(finish: EpiMod, x: Tensor, linear: Linear, c: Tensor | None = None, **operands: Tensor) -> Tensor:
    """(N, in) -> (N, out), by the tiles that reach least beyond the columns, the widest of those that are equal."""
    tiles = min(TILES, key=lambda t: -linear.out_features % t.tile_n)
    return finish(x, linear.weight.T, c, bias=linear.bias, **operands, config=tiles, tuned=False)["D"]


@triton.jit
def _layer_norm(x, weight, bias, out, width, eps, WIDE: tl.constexpr):
    column = tl.arange(0, WIDE)
    there = column < width
    here = tl.program_id(0).to(tl.int64) * width + column
    value = tl.load(x + here, mask=there, other=0.0).to(tl.float32)
    apart = tl.where(there, value - tl.sum(value, 0) / width, 0.0)
    spread = tl.rsqrt(tl.sum(apart * apart, 0) / width + eps)
    w = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + here, (apart * spread * w + b).to(out.dtype.element_ty), mask=there)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """(N, D) -> (N, D). torch's own takes 44 us for 16,384 rows of 1,152 and its compiled one 73."""
    out = torch.empty_like(x)
    wide = triton.next_power_of_2(x.shape[1])
    _layer_norm[(len(x),)](x, norm.weight, norm.bias, out, x.shape[1], norm.eps, wide, num_warps=4)
    return out


@cache
def fused(compiled: Kernels) -> Kernels:
    """The steps, fused where that pays and as `compiled` elsewhere."""
    norm = torch.compile(RmsNorm.forward, dynamic=True, fullgraph=True)

    def tower(block: VisionBlock, x: Tensor) -> Tensor:
        maps = [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2]
        if not _fits(x, maps):
            return compiled.run_block(block, x)
        return _beside(maps[0].lora, x, run_block(block, x), lambda: compiled.run_block(block, x))

    def gate(layer: LlamaLayer, x: Tensor) -> Tensor:
        gate_up = layer.mlp.gate_up_proj
        if not _fits(x, [gate_up]):
            return compiled.gate_up(layer, x)
        ours = gated(norm(layer.post_attention_layernorm, x).flatten(0, 1), gate_up.weight).view(*x.shape[:2], -1)
        return _beside(gate_up.lora, x, ours, lambda: compiled.gate_up(layer, x))

    return replace(compiled, run_block=tower, gate_up=gate)


def _fits(x: Tensor, maps: list[nn.Module]) -> bool:
    """Many rows, and maps that are not quantised, with rows of whole 16 bytes as the card's copy engine moves them."""
    whole = all(isinstance(m, Linear) and m.in_features % 8 == 0 and m.out_features % 8 == 0 for m in maps)
    return whole and x.shape[:-1].numel() >= LEAST


def _beside(lora: LoraColumns | None, x: Tensor, ours: Tensor, compiled: Callable[[], Tensor]) -> Tensor:
    """`ours` for the base's rows or tokens; those of adapters as `compiled`."""
    return ours if lora is None else torch.where(lora.slots.of(x)[..., None] == 0, ours, compiled())
