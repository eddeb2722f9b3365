"""Llama 2, the language model, with parameter names as in its checkpoints (arxiv.org/abs/2307.09288).

Written out rather than taken from transformers, because decoding and scoring need what its interface hides: attention
of any form, a cache whose rows have different lengths, keys and values of all tokens but the output of few, and matrix
products joined where several maps read the same input (checkpoints have them apart).

A layer is a few steps, each of which can be compiled by itself:
    attention  residual stream -> attended heads, keys, values; `qkv` and what it is handed to attend with
    finish     attended heads -> residual stream: the output map, then the gated MLP
While decoding, keys and values go into a cache by kernels that no compiler sees, and the last products of attention and
MLP are added in the residual stream's own memory. So the steps there are smaller:
    heads      residual stream -> q, k, v not yet rotated, for prompts
    qkv        residual stream -> q and k rotated, and v, for one new token
    gate_up    residual stream -> the gated MLP up to its last map

Legend: B batch, T tokens, N tokens of packed prompts, R rows kept, S cache slots, H heads, K head width, D width,
F hidden width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spvla.model.attention import Attend, Packing, Rope, attend_new, attend_prompts, keep_prompts, rotary, rotate
from spvla.model.kernels import lora as fused
from spvla.model.linear import FusedLinear, Linear, add_to, keep_names
from spvla.model.vision import Projector, VisionBlock


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

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


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
        self.num_heads, self.head_width = config.num_heads, config.head_width
        self.qkv_proj = FusedLinear(config.width, dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.width))
        self.o_proj = Linear(config.width, config.width, bias=False)
        keep_names(self, "qkv_proj")

    def heads(self, x: Tensor, with_q: bool = True) -> list[Tensor]:
        """(B, T, D) -> q (unless left out), k, v, not yet rotated, each (B, T, H, K)."""
        y = self.qkv_proj(x) if with_q else self.qkv_proj.after(x, 1)
        return [part.unflatten(-1, (self.num_heads, -1)) for part in y.split(self.o_proj.out_features, -1)]

    def qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q, k rotated, and v, each (B, H, T, K)."""
        if fused.fits(x, self.qkv_proj.lora, head=self.head_width):
            return fused.heads(x, self.qkv_proj.weight, self.qkv_proj.lora, *rope)
        q, k, v = self.heads(x)
        return rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)


class LlamaMlp(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up_proj = FusedLinear(config.width, dict.fromkeys(("gate_proj", "up_proj"), config.mlp_hidden))
        self.down_proj = Linear(config.mlp_hidden, config.width, bias=False)
        keep_names(self, "gate_up_proj")

    def gate_up(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, F), what `down_proj` takes."""
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        gate_up, down = self.gate_up_proj, self.down_proj
        if fused.fits(x, gate_up.lora, down.lora):
            return fused.gated_mlp(x, gate_up.weight, gate_up.lora, down.weight, down.lora)
        return down(self.gate_up(x))


class LlamaLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMlp(config)
        self.input_layernorm = RmsNorm(config.width, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.width, config.rms_norm_eps)

    def heads(self, x: Tensor, with_q: bool = True) -> list[Tensor]:
        """(B, T, D) -> q (unless left out), k, v, not yet rotated, each (B, T, H, K)."""
        return self.self_attn.heads(self.input_layernorm(x), with_q)

    def qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q, k rotated, and v, each (B, H, T, K)."""
        return self.self_attn.qkv(self.input_layernorm(x), rope)

    def attention(self, x: Tensor, rope: Rope, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> attended heads (B, T, D), and k, v, each (B, H, T, K)."""
        q, k, v = (part.contiguous() for part in self.qkv(x, rope))
        return attend(q, k, v), k, v

    def gate_up(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, F), what `down_proj` takes."""
        return self.mlp.gate_up(self.post_attention_layernorm(x))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Output map, residual, gated MLP: (B, T, D) twice -> (B, T, D)."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The steps of a pass, each of which may be replaced by a compiled one."""

    run_block: Callable[[VisionBlock, Tensor], Tensor] = VisionBlock.forward
    project: Callable[[Projector, Tensor], Tensor] = Projector.forward
    heads: Callable[[LlamaLayer, Tensor, bool], list[Tensor]] = LlamaLayer.heads
    qkv: Callable[[LlamaLayer, Tensor, Rope], tuple[Tensor, Tensor, Tensor]] = LlamaLayer.qkv
    attention: Callable[[LlamaLayer, Tensor, Rope, Attend], tuple[Tensor, Tensor, Tensor]] = LlamaLayer.attention
    gate_up: Callable[[LlamaLayer, Tensor], Tensor] = LlamaLayer.gate_up
    finish: Callable[[LlamaLayer, Tensor, Tensor], Tensor] = LlamaLayer.finish


EAGER = Kernels()


def adding_in_place(kernels: Kernels) -> Kernels:
    """For decoding: `finish` adds in the memory of the residual stream it is given. Without gradients."""

    def finish(layer: LlamaLayer, x: Tensor, attended: Tensor) -> Tensor:
        x = add_to(x, attended, layer.self_attn.o_proj)
        return add_to(x, kernels.gate_up(layer, x), layer.mlp.down_proj)

    return replace(kernels, finish=finish)


class KeysValues(NamedTuple):
    """Of one layer, each (B, H, S, K)."""

    keys: Tensor
    values: Tensor


class Cache:
    """Keys and values of every layer, for B rows of up to S tokens each, without gaps."""

    def __init__(
        self, config: LlamaConfig, batch: int, slots: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots = slots
        shape = (batch, slots, config.num_heads, config.head_width)  # a token's heads lie together

        def zeros() -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2)

        self.layers = [KeysValues(zeros(), zeros()) for _ in range(config.depth)]


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
        attend: Attend,
        *,
        positions: Tensor | None = None,
        rows: Tensor | None = None,
        caches: list[KeysValues] | None = None,
        kernels: Kernels = EAGER,
    ) -> Tensor:
        """Embeddings (B, T, D) -> final hidden states (B, T, D), or of the `rows` (B, R) alone, (B, R, D).

        positions: (B or 1, T); None counts from 0. caches: an empty list, which gets each layer's keys and values.
        Other rows than those asked for end with the last layer's attention.
        """
        rope = self.rotary(torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions)
        for layer in self.layers:
            attended, *own = kernels.attention(layer, x, rope, attend)
            if caches is not None:
                caches.append(KeysValues(*own))
            if rows is not None and layer is self.layers[-1]:
                x, attended = take_rows(x, rows), take_rows(attended, rows)
            x = kernels.finish(layer, x, attended)
        return self.norm(x)

    def read(self, x: Tensor, packing: Packing, last: Tensor, cache: Cache, kernels: Kernels = EAGER) -> Tensor:
        """Packed prompts (1, N, D) into the cache -> hidden states (B, 1, D) of each prompt's last token.

        last: (B,), the slot of that token. In the last layer the others leave only keys and values, and the last
        tokens go on as new ones do.
        """
        cos, sin = self.rotary(torch.arange(cache.slots, device=x.device)[None])
        rope = cos[0, :, 0], sin[0, :, 0]
        for layer, own in zip(self.layers[:-1], cache.layers[:-1], strict=True):
            q, k, v = (t[0] for t in kernels.heads(layer, x, True))
            x = kernels.finish(layer, x, attend_prompts(q, k, v, rope, *own, packing).flatten(1)[None])
        k, v = (t[0] for t in kernels.heads(self.layers[-1], x, False))
        keep_prompts(k, v, rope, *cache.layers[-1], packing)
        x, rope = x[0, packing.starts[:-1] + last, None], self.rotary(last[:, None])
        return self.norm(self._advance(self.layers[-1], x, rope, cache.layers[-1], last, kernels))

    def step(self, x: Tensor, at: Tensor, caches: Sequence[KeysValues], kernels: Kernels = EAGER) -> Tensor:
        """One token further for each row, into slot `at` (B,) of each layer's cache: (B, 1, D) -> (B, 1, D)."""
        rope = self.rotary(at[:, None])
        for layer, own in zip(self.layers, caches, strict=True):
            x = self._advance(layer, x, rope, own, at, kernels)
        return self.norm(x)

    def rotary(self, positions: Tensor) -> Rope:
        """(B, T) -> cos and sin, each (B, T, 1, K) float32."""
        return rotary(positions, self.config.head_width, self.config.rope_theta)

    def _advance(
        self, layer: LlamaLayer, x: Tensor, rope: Rope, own: KeysValues, at: Tensor, kernels: Kernels
    ) -> Tensor:
        attended = attend_new(*kernels.qkv(layer, x, rope), *own, at)
        return kernels.finish(layer, x, attended.transpose(1, 2).flatten(2))


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.width, config.vocab_size, bias=False)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, T, D), (B, R) -> (B, R, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
