"""The two image encoders, DINOv2 and SigLIP, and the projector; parameter names as in OpenVLA's checkpoints.

Both are pre-norm vision transformers on 224 x 224 pixels cut into 256 patches of 14 x 14. OpenVLA takes the output of
the last block but one, without the final norm, so the last block, `norm` and SigLIP's `attn_pool` are in the
checkpoints (and get LoRA) but never run.

Legend: B batch, P patches (256), T tokens (P + prefix), D width, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spvla.model.linear import Linear, PatchLinear
from spvla.types import IMAGE_SIZE

PATCH_SIZE = 14
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Sizes of one encoder. DINOv2 has a class token, four registers and LayerScale; SigLIP has a pooling head."""

    width: int
    depth: int
    num_heads: int
    mlp_hidden: int
    num_registers: int = 0
    class_token: bool = False
    layer_scale: bool = False
    pool: bool = False


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D / H)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1.product(x) + self.fc1.bias if isinstance(self.fc1, Linear) else self.fc1(x)
        return self.fc2(F.gelu(h))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class VisionBlock(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        scale = (lambda: LayerScale(config.width)) if config.layer_scale else nn.Identity
        self.norm1 = nn.LayerNorm(config.width, eps=EPS)
        self.attn = Attention(config.width, config.num_heads)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(config.width, eps=EPS)
        self.mlp = Mlp(config.width, config.mlp_hidden)
        self.ls2 = scale()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = PatchLinear(3, width, PATCH_SIZE)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 224, 224) -> (B, P, D)."""
        grid = pixels.unflatten(3, (-1, PATCH_SIZE)).unflatten(2, (-1, PATCH_SIZE))  # (B, 3, 16, 14, 16, 14)
        return self.proj(grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))


class AttentionPool(nn.Module):
    """SigLIP's pooling head: its parameters are in the checkpoints, and OpenVLA never runs it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, hidden)


RunBlock = Callable[[VisionBlock, Tensor], Tensor]


class VisionTower(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.class_token else None
        registers = config.num_registers
        self.reg_token = nn.Parameter(torch.zeros(1, registers, config.width)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, NUM_PATCHES, config.width))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.attn_pool = AttentionPool(config.width, config.mlp_hidden) if config.pool else None

    def forward(self, pixels: Tensor, run_block: RunBlock = VisionBlock.__call__) -> Tensor:
        """(B, 3, 224, 224) -> (B, P, D). `run_block` may be a compiled form of a block's forward."""
        x = self.patch_embed(pixels) + self.pos_embed  # class token and registers have no position
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = torch.cat([*prefix, x], 1)
        for block in self.blocks[:-1]:
            x = run_block(block, x)
        return x[:, -NUM_PATCHES:]


class VisionBackbone(nn.Module):
    """Both towers side by side, their features concatenated."""

    def __init__(self, dino: TowerConfig, siglip: TowerConfig) -> None:
        super().__init__()
        self.featurizer = VisionTower(dino)
        self.fused_featurizer = VisionTower(siglip)

    def forward(self, pixel_values: Tensor, run_block: RunBlock = VisionBlock.__call__) -> Tensor:
        """(B, 6, 224, 224), DINOv2's channels first -> (B, P, dino + siglip)."""
        dino, siglip = pixel_values.split(3, 1)
        return torch.cat((self.featurizer(dino, run_block), self.fused_featurizer(siglip, run_block)), -1)


class Projector(nn.Module):
    """Vision features -> the language model's width."""

    def __init__(self, vision_width: int, hidden: int, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(vision_width, hidden)
        self.fc2 = Linear(hidden, width)
        self.fc3 = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, dino + siglip) -> (B, P, D)."""
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))
