"""OpenVLA (arxiv.org/abs/2406.09246): two vision towers, a projector, Llama; parameter names as in its checkpoints.

    pixel values (B, 6, 224, 224) -> towers -> (B, 256, dino + siglip) -> projector -> patches (B, 256, D)
    token ids    (B, T)           -> embeddings; the patches stand right after BOS
    [BOS, patches, prompt, ...]   -> Llama -> hidden (B, 256 + T, D) -> logits

Padding stands on the right: causal attention never looks there, so no mask is needed for it.

Legend: B batch, T tokens, P patches (256), D width, V vocabulary.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spvla.errors import CheckpointError
from spvla.model.attention import CAUSAL, Attend, Masked
from spvla.model.llama import EAGER, Kernels, KeysValues, Llama, LlamaConfig
from spvla.model.vision import NUM_PATCHES, Projector, TowerConfig, VisionBackbone

IGNORED = -100  # label of a position that has no loss

# Heads are not visible in tensor shapes: published widths have heads of 64, but for SigLIP-SO400M's 16 heads of 72.
_HEADS_OF_WIDTH = {1152: 16}
_HEAD_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class OpenVLAConfig:
    dino: TowerConfig
    siglip: TowerConfig
    llm: LlamaConfig

    @property
    def projector_hidden(self) -> int:
        return 4 * (self.dino.width + self.siglip.width)

    @classmethod
    def from_json(
        cls,
        config: Mapping[str, Any],
        shapes: Mapping[str, Sequence[int]],
        tower_heads: Mapping[str, int] | None = None,
    ) -> "OpenVLAConfig":
        """`config` is config.json, `shapes` the checkpoint's tensors; what both tell must agree.

        tower_heads: {timm model id: number of heads}, for towers of a size that was never published.
        """
        text = config.get("text_config") or {}
        ids = config.get("timm_model_ids") or ["", ""]
        heads = [(tower_heads or {}).get(name) for name in ids]
        return cls(
            dino=_tower(shapes, "vision_backbone.featurizer", heads[0]),
            siglip=_tower(shapes, "vision_backbone.fused_featurizer", heads[1]),
            llm=_llama(shapes, text),
        )


class Output(NamedTuple):
    logits: Tensor  # (B, P + T, V)
    loss: Tensor | None


class OpenVLA(nn.Module):
    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_backbone = VisionBackbone(config.dino, config.siglip)
        vision_width = config.dino.width + config.siglip.width
        self.projector = Projector(vision_width, config.projector_hidden, config.llm.width)
        self.language_model = Llama(config.llm)

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.model.norm.weight.device

    def added(self) -> dict[str, nn.Module]:
        """Modules that a fine-tuned form of this model has beside its checkpoint's weights, by name; none here."""
        return {}

    def patches(self, pixel_values: Tensor, kernels: Kernels = EAGER) -> Tensor:
        """(B, 6, 224, 224) -> (B, P, D)."""
        return kernels.project(self.projector, self.vision_backbone(pixel_values.to(self.dtype), kernels.run_block))

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        return self.language_model.model.embed_tokens(input_ids)

    def hidden(
        self,
        embeds: Tensor,
        attend: Attend = CAUSAL,
        *,
        positions: Tensor | None = None,
        rows: Tensor | None = None,
        caches: list[KeysValues] | None = None,
        kernels: Kernels = EAGER,
    ) -> Tensor:
        """Embeddings (B, T, D) -> hidden states after the final norm, (B, T, D), or of the `rows` (B, R) alone.

        attend: see attention.py. positions: (B or 1, T), from 0 on by default. caches: an empty list, which gets each
        layer's keys and values.
        """
        kind = {"positions": positions, "rows": rows, "caches": caches, "kernels": kernels}
        return self.language_model.model(embeds, attend, **kind)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.language_model.lm_head(hidden)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        """Teacher-forced pass over (B, T) ids; the loss is the mean over labels (B, T) that are not -100."""
        x = with_patches(self.embed(input_ids), self.patches(pixel_values))
        attend = CAUSAL if attention_mask is None else _without_padding(_widen(attention_mask, 1))
        logits = self.logits(self.hidden(x, attend))
        if labels is None:
            return Output(logits, None)
        targets = _widen(labels, IGNORED)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=IGNORED)
        return Output(logits, loss)


def never_runs(config: OpenVLAConfig, name: str) -> bool:
    """Whether a parameter or module of a checkpoint is one that no pass touches: each tower's last block, final norm
    and pooling."""
    towers = {"vision_backbone.featurizer": config.dino, "vision_backbone.fused_featurizer": config.siglip}
    return any(
        f"{name}.".startswith((f"{tower}.blocks.{c.depth - 1}.", f"{tower}.norm.", f"{tower}.attn_pool."))
        for tower, c in towers.items()
    )


def with_patches(embeds: Tensor, patches: Tensor) -> Tensor:
    """Prompt embeddings (B, T, D) and patches (B, P, D) -> [BOS, patches, rest] (B, P + T, D)."""
    return torch.cat((embeds[:, :1], patches.to(embeds.dtype), embeds[:, 1:]), 1)


def _without_padding(attention_mask: Tensor) -> Masked:
    """Causal, and no key where the mask (B, T) is 0."""
    tokens = attention_mask.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=attention_mask.device).tril()
    return Masked(causal & attention_mask.bool()[:, None, None])


def _widen(x: Tensor, fill: int) -> Tensor:
    """(B, T) -> (B, P + T), `fill` on the patches."""
    return torch.cat((x[:, :1], x.new_full((len(x), NUM_PATCHES), fill), x[:, 1:]), 1)


def _tower(shapes: Mapping[str, Sequence[int]], name: str, num_heads: int | None) -> TowerConfig:
    width = _shape(shapes, f"{name}.pos_embed")[2]
    registers = f"{name}.reg_token"
    num_heads = num_heads or _HEADS_OF_WIDTH.get(width, max(1, width // _HEAD_WIDTH))
    if width % num_heads:
        raise CheckpointError(
            f"{name} of width {width} with {num_heads} heads",
            expected="a number of heads that divides the width",
            remedy="Take the file of its heads that was written with the checkpoint.",
        )
    return TowerConfig(
        width=width,
        depth=_depth(shapes, f"{name}.blocks"),
        num_heads=num_heads,
        mlp_hidden=_shape(shapes, f"{name}.blocks.0.mlp.fc1.weight")[0],
        num_registers=shapes[registers][1] if registers in shapes else 0,
        class_token=f"{name}.cls_token" in shapes,
        layer_scale=f"{name}.blocks.0.ls1.scale_factor" in shapes,
        pool=f"{name}.attn_pool.latent" in shapes,
    )


def _llama(shapes: Mapping[str, Sequence[int]], text: Mapping[str, Any]) -> LlamaConfig:
    vocab_size, width = _shape(shapes, "language_model.model.embed_tokens.weight")
    num_heads = text.get("num_attention_heads", LlamaConfig.num_heads)
    if text.get("num_key_value_heads", num_heads) != num_heads or width % num_heads:
        raise CheckpointError(
            f"config.json with {num_heads} heads, {text.get('num_key_value_heads', num_heads)} of them for keys, "
            f"at width {width}",
            expected="as many key heads as query heads, dividing the width (Llama 2 7B)",
            remedy="Use a checkpoint of the OpenVLA family.",
        )
    return LlamaConfig(
        width=width,
        depth=_depth(shapes, "language_model.model.layers"),
        num_heads=num_heads,
        mlp_hidden=_shape(shapes, "language_model.model.layers.0.mlp.gate_proj.weight")[0],
        vocab_size=vocab_size,
        rms_norm_eps=text.get("rms_norm_eps", LlamaConfig.rms_norm_eps),
        rope_theta=text.get("rope_theta", LlamaConfig.rope_theta),
    )


def _shape(shapes: Mapping[str, Sequence[int]], name: str) -> Sequence[int]:
    if name not in shapes:
        raise CheckpointError(
            f"a checkpoint without the tensor {name}",
            expected="the tensors of an OpenVLA model",
            remedy="Take a whole OpenVLA checkpoint.",
        )
    return shapes[name]


def _depth(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(m[1]) for m in map(pattern.match, shapes) if m), default=0)
