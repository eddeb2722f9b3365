"""Llama 2, the language model, with parameter names as in its checkpoints (arxiv.org/abs/2307.09288).

Written out rather than taken from transformers, because decoding and scoring need what its interface hides: attention
masks of any form, a cache whose rows have different lengths, keys and values of all tokens but the output of one, and
matrix products joined where several maps read the same input.

A layer is three steps, so that each can be compiled by itself. The last map of attention and that of the MLP stand
after theirs, because with a cache their products are added in the residual stream's own memory:
    project  residual stream -> q, k rotated, and v (`read`: not yet rotated, for prompts that go into a cache)
    attend   with a causal mask, a given one, or into a cache: packed prompts, one new token; then `o_proj`, added
    open     residual stream -> gated MLP up to its last map; then `down_proj`, added

Legend: B batch, T tokens, N tokens of packed prompts, S cache slots, H heads, K head width, D width, F hidden width,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spvla.model.attention import Packing, Rope, attend_new, attend_prompts, keep_prompts, rotate
from spvla.model.linear import Linear, add_to, pack, together
from spvla.model.vision import Block, RunBlock


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Defaults are Llama-2-7B's, with the vocabulary and the norm's epsilon that OpenVLA's checkpoints have."""

    width: int = 4096
    depth: int = 32
    num_heads: int = 32
    mlp_hidden: int = 11008
    vocab_size: int = 32064
    rms_norm_eps: float = 1e-6  # not Llama-2's 1e-5: the original's config falls back to transformers' default
    rope_theta: float = 10_000.0


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(config.width, config.width, bias=False) for _ in range(4)
        )
        self.packed: Tensor | None = None  # q, k, v in one tensor, while decoding

    def heads(self, x: Tensor, with_q: bool = True) -> list[Tensor]:
        """(B, T, D) -> q (unless left out), k, v, each (B, T, H, K)."""
        maps, packed = [self.q_proj, self.k_proj, self.v_proj], self.packed
        if not with_q:
            maps, packed = maps[1:], None if packed is None else packed[self.q_proj.out_features :]
        return [y.unflatten(-1, (self.num_heads, -1)) for y in together(x, maps, packed)]

    def forward(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q, k rotated, and v, each (B, H, T, K)."""
        q, k, v = (y.transpose(1, 2) for y in self.heads(x))
        return rotate(q, rope), rotate(k, rope), v


class LlamaMlp(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.width, config.mlp_hidden, bias=False)
        self.up_proj = Linear(config.width, config.mlp_hidden, bias=False)
        self.down_proj = Linear(config.mlp_hidden, config.width, bias=False)
        self.packed: Tensor | None = None  # gate and up in one tensor, while decoding

    def open(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, F), what `down_proj` takes."""
        gate, up = together(x, [self.gate_proj, self.up_proj], self.packed)
        return F.silu(gate) * up


class LlamaLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMlp(config)
        self.input_layernorm = RmsNorm(config.width, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.width, config.rms_norm_eps)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn(self.input_layernorm(x), rope)

    def read(self, x: Tensor, with_q: bool = True) -> list[Tensor]:
        """(B, T, D) -> q (unless left out), k, v, not yet rotated, each (B, T, H, K)."""
        return self.self_attn.heads(self.input_layernorm(x), with_q)

    def open(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, F), what `down_proj` takes."""
        return self.mlp.open(self.post_attention_layernorm(x))


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The steps that a decoder may replace by compiled ones."""

    run_block: RunBlock = Block.__call__
    project: Callable[[LlamaLayer, Tensor, Rope], tuple[Tensor, Tensor, Tensor]] = LlamaLayer.project
    read: Callable[[LlamaLayer, Tensor, bool], list[Tensor]] = LlamaLayer.read
    open: Callable[[LlamaLayer, Tensor], Tensor] = LlamaLayer.open


EAGER = Kernels()


class Cache:
    """Keys and values of every layer, for B rows of up to S tokens each, without gaps."""

    def __init__(
        self, config: LlamaConfig, batch: int, slots: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots = slots
        shape = (batch, slots, config.num_heads, config.width // config.num_heads)
        self.keys, self.values = (  # each (B, H, S, K); a token's heads lie together
            [torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(config.depth)]
            for _ in range(2)
        )


class LlamaModel(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.depth))
        self.norm = RmsNorm(config.width, config.rms_norm_eps)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, D) -> final hidden states (B, T, D).

        mask: (B or 1, 1, T, T) bool (True attends) or added to the scores; None is causal.
        positions: (B or 1, T); None counts from 0.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        rope = rotary(positions, self.config, x.dtype)
        for layer in self.layers:
            attended = attend(*layer.project(x, rope), mask)
            x = x + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
            x = x + layer.mlp.down_proj(layer.open(x))
        return self.norm(x)

    def read(self, x: Tensor, packing: Packing, last: Tensor, cache: Cache, kernels: Kernels = EAGER) -> Tensor:
        """Packed prompts (1, N, D) into the cache -> hidden states (B, 1, D) of each prompt's last token.

        last: (B,), the slot of that token. x is scratch memory. In the last layer the others leave only keys and
        values, and the last tokens go on as new ones do.
        """
        cos, sin = rotary(torch.arange(cache.slots, device=x.device)[None], self.config, x.dtype)
        rope = cos[0, 0], sin[0, 0]
        *before, (final, keys, values) = zip(self.layers, cache.keys, cache.values, strict=True)
        for layer, *own in before:
            q, k, v = (t[0] for t in kernels.read(layer, x, True))
            attended = attend_prompts(q, k, v, rope, *own, packing).flatten(1)[None]
            x = add_to(x, attended, layer.self_attn.o_proj)
            x = add_to(x, kernels.open(layer, x), layer.mlp.down_proj)
        k, v = (t[0] for t in kernels.read(final, x, False))
        keep_prompts(k, v, rope, keys, values, packing)
        x, rope = x[0, packing.starts[:-1] + last, None], rotary(last[:, None], self.config, x.dtype)
        return self.norm(self._advance(final, x, rope, keys, values, last, kernels))

    def step(self, x: Tensor, at: Tensor, cache: Cache, kernels: Kernels = EAGER) -> Tensor:
        """One token further for each row, into slot `at` (B,): (B, 1, D) -> (B, 1, D). x is scratch memory."""
        rope = rotary(at[:, None], self.config, x.dtype)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = self._advance(layer, x, rope, keys, values, at, kernels)
        return self.norm(x)

    def _advance(
        self, layer: LlamaLayer, x: Tensor, rope: Rope, keys: Tensor, values: Tensor, at: Tensor, kernels: Kernels
    ) -> Tensor:
        attended = attend_new(*kernels.project(layer, x, rope), keys, values, at)
        x = add_to(x, attended.transpose(1, 2).flatten(2), layer.self_attn.o_proj)
        return add_to(x, kernels.open(layer, x), layer.mlp.down_proj)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, H, T, K) three times -> (B, H, T, K), causal unless a mask says otherwise."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.width, config.vocab_size, bias=False)

    def pack(self) -> None:
        """Joins weights that read the same input, for decoding; training and saving go on as before."""
        for layer in self.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            if attention.packed is None:
                attention.packed = pack([attention.q_proj, attention.k_proj, attention.v_proj])
            if mlp.packed is None:
                mlp.packed = pack([mlp.gate_proj, mlp.up_proj])

    def unpack(self) -> None:
        """Forgets that weights were joined: before they are moved, wrapped or replaced."""
        for layer in self.model.layers:
            layer.self_attn.packed = layer.mlp.packed = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Llama":
        self.unpack()  # `.to(...)` gives each weight memory of its own
        return super()._apply(fn, recurse)


def rotary(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> Rope:
    """Positions (B, T) -> cos and sin (B, 1, T, K) of RoPE's angles (arxiv.org/abs/2104.09864)."""
    width = config.width // config.num_heads
    exponents = torch.arange(0, width, 2, device=positions.device).float() / width
    angles = positions[:, None, :, None].float() * config.rope_theta**-exponents
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
