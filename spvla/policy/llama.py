"""Llama 2, the language model, with parameter names as in its checkpoints (arxiv.org/abs/2307.09288).

Written out rather than taken from transformers, because decoding and scoring need what its interface hides: attention
masks of any form, a cache whose rows have different lengths, keys and values of all tokens but the output of one, and
matrix products joined where several maps read the same input.

A layer is three steps, so that each can be compiled by itself. The last map of attention and that of the MLP stand
after theirs, because with a cache their products are added in the residual stream's own memory:
    project  residual stream -> rotated q, k, and v (`fill`: k and v go into a cache)
    attend   with a causal mask, a given one, or one new token against a cache; then `o_proj`, added
    open     residual stream -> gated MLP up to its last map; then `down_proj`, added

Legend: B batch, T tokens, S cache slots, H heads, K head width, D width, F hidden width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spvla.policy.attend import attend_new
from spvla.policy.linear import Linear, add_to, pack, plus, together
from spvla.policy.vision import Block, RunBlock


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


Rope = tuple[Tensor, Tensor]  # cos and sin, each (1 or B, 1, T, K)


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

    def forward(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q, k rotated, and v, each (B, H, T, K)."""
        maps = [self.q_proj, self.k_proj, self.v_proj]
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in together(x, maps, self.packed))
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

    def fill(self, x: Tensor, rope: Rope, keys: Tensor, values: Tensor) -> Tensor:
        """As `project`, k and v going into `keys` and `values` (B, H, T, K), parts of a cache; returns q."""
        q, k, v = self.project(x, rope)
        keys.copy_(k)
        values.copy_(v)
        return q

    def open(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, F), what `down_proj` takes."""
        return self.mlp.open(self.post_attention_layernorm(x))


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The steps that a decoder may replace by compiled ones."""

    run_block: RunBlock = Block.__call__
    project: Callable[[LlamaLayer, Tensor, Rope], tuple[Tensor, Tensor, Tensor]] = LlamaLayer.project
    fill: Callable[[LlamaLayer, Tensor, Rope, Tensor, Tensor], Tensor] = LlamaLayer.fill
    open: Callable[[LlamaLayer, Tensor], Tensor] = LlamaLayer.open


EAGER = Kernels()


class Cache:
    """Keys and values of every layer, for B rows of up to S tokens each, without gaps: a row's next token is written
    over its padding. `at` (B,) is where the coming token of each row goes; None while the prompts are read."""

    def __init__(
        self, config: LlamaConfig, batch: int, slots: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch, config.num_heads, slots, config.width // config.num_heads)
        self.keys, self.values = (  # one tensor a layer: compiled code that writes to one wants no aliases
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.depth)] for _ in range(2)
        )
        self.at: Tensor | None = None

    def layer(self, i: int, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens, or of all slots: each (B, H, tokens, K)."""
        return self.keys[i][:, :, :tokens], self.values[i][:, :, :tokens]


class LlamaModel(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.depth))
        self.norm = RmsNorm(config.width, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        last: Tensor | None = None,
        kernels: Kernels = EAGER,
    ) -> Tensor:
        """Embeddings (B, T, D) -> final hidden states (B, T, D).

        mask: (B or 1, 1, T, T) bool (True attends) or added to the scores; None is causal. With a cache there is none.
        positions: (B or 1, T); None counts from 0. last: (B,) the one token of each row to go on with after the last
        layer's attention, for an output (B, 1, D); for prompts read into a cache. A cache also makes x scratch memory.
        """
        add = plus if cache is None else add_to
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        rope = rotary(positions, self.config, x.dtype)
        for i, layer in enumerate(self.layers):
            if cache is None:
                attended = attend(*kernels.project(layer, x, rope), mask)
            elif cache.at is not None:
                attended = attend_new(*kernels.project(layer, x, rope), *cache.layer(i), cache.at)
            else:
                keys, values = cache.layer(i, x.shape[1])
                q = kernels.fill(layer, x, rope, keys, values)
                if last is not None and i == self.config.depth - 1:
                    x, q, k, v = take(x, last), *(take_head_rows(t, last) for t in (q, keys, values))
                    attended = attend_new(q, k, v, *cache.layer(i), last)
                else:
                    attended = attend(q, keys, values)
            x = add(x, attended.transpose(1, 2).flatten(2), layer.self_attn.o_proj)
            x = add(x, kernels.open(layer, x), layer.mlp.down_proj)
        return self.norm(x)


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


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """(B, H, T, K) -> same, each pair (i, i + K / 2) turned by its position's angle."""
    cos, sin = rope
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def take(x: Tensor, rows: Tensor) -> Tensor:
    """(B, T, D), (B,) -> (B, 1, D)."""
    return x.gather(1, rows[:, None, None].expand(-1, -1, x.shape[-1]))


def take_head_rows(x: Tensor, rows: Tensor) -> Tensor:
    """(B, H, T, K), (B,) -> (B, H, 1, K)."""
    return x.gather(2, rows[:, None, None, None].expand(-1, x.shape[1], -1, x.shape[-1]))
