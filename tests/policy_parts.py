"""What the policy's tests share: the reference model and its outputs under the original code, requests, adapters."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spvla.model.linear import named_maps
from spvla.model.llama import LlamaConfig
from spvla.model.lora_file import LoraFile, fresh_lora
from spvla.model.openvla import OpenVLA, OpenVLAConfig
from spvla.model.vision import TowerConfig
from spvla.policies.checkpoint import load_model
from spvla.types import Observation

REFERENCE = Path(__file__).parent / "reference"

INSTRUCTIONS = (
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "open the middle drawer of the cabinet",
    "turn on the stove",
    "put both the cream cheese box and the butter in the basket",
    "xyzzy",
)


@cache
def reference_numbers() -> dict[str, Any]:
    """What OpenVLA's own code gave on the reference model."""
    return json.loads((REFERENCE / "numbers.json").read_text())


def reference_image(i: int) -> np.ndarray:
    """(224, 224, 3) uint8: two slopes and their mean, noise, a scene, flat colours."""
    if i == 0:
        x, y = np.meshgrid(np.arange(224), np.arange(224))
        return np.stack([x, y, (x + y) // 2], -1).astype(np.uint8)
    if i == 1:
        return np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    return np.asarray(Image.open(REFERENCE / f"image{i}.png"))


def reference_model() -> OpenVLA:
    """The tiny model that the original code ran: every weight from a generator seeded by its name."""
    config = OpenVLAConfig(
        dino=TowerConfig(
            **{"width": 48, "depth": 4, "num_heads": 4, "mlp_hidden": 192},
            **{"num_registers": 4, "class_token": True, "layer_scale": True},
        ),
        siglip=TowerConfig(width=40, depth=3, num_heads=5, mlp_hidden=149, pool=True),
        llm=LlamaConfig(width=64, depth=2, num_heads=4, mlp_hidden=176),
    )
    model = OpenVLA(config)
    model.load_state_dict(reference_weights({name: t.shape for name, t in model.state_dict().items()}))
    return model.eval()


def reference_weights(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    return {name: reference_weight(name, shape) for name, shape in shapes.items()}


def reference_weight(name: str, shape: torch.Size) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(f"0:{name}".encode()).digest()[:6], "little")
    r = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    bias = name.endswith("bias")
    if any(part in name for part in ("layernorm", ".norm", "norm1", "norm2")) and not bias:
        return 1 + 0.1 * r
    if name.endswith("scale_factor"):
        return 0.6 + 0.2 * r
    if name.endswith(("pos_embed", "cls_token", "reg_token", "latent")):
        return 0.3 * r
    if bias:
        return 0.1 * r
    if "embed_tokens" in name:
        return r
    if "lm_head" in name:
        r *= 0.3
        r[31744:32000] *= 2
        r[2] *= 2
        return r
    return r / r[0].numel() ** 0.5


def gradients_of(model: OpenVLA) -> dict[str, Tensor | None]:
    """Each gradient by the checkpoint's name, None where there is none."""
    found = {name: p.grad for name, p in model.named_parameters()}
    for named in named_maps(model).values():
        if named.name != named.path:
            whole, parts = found[f"{named.path}.weight"], named.module.parts
            found[f"{named.name}.weight"] = whole.split([*parts.values()])[named.part]
    return {name: found[name] for name in model.state_dict()}


def requests(count: int) -> tuple[list[np.ndarray], list[str]]:
    """Images and instructions of different lengths."""
    images = np.random.default_rng(7).integers(0, 256, (count, 14, 14, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    return list(images), [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(count)]


def observations(count: int) -> list[Observation]:
    """The same, as a policy of one image and one step is asked."""
    pairs = zip(*requests(count), strict=True)
    return [Observation(images=(image,), instruction=instruction) for image, instruction in pairs]


def random_lora(model: OpenVLA, *, rank: int = 4, seed: int = 0, strength: float = 0.1) -> LoraFile:
    """An adapter that changes what the model does: both of its factors random."""
    lora = fresh_lora(model, rank=rank, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    factors = {name: (a, strength * torch.randn(b.shape, generator=generator)) for name, (a, b) in lora.factors.items()}
    return replace(lora, factors=factors)


def write_adapter(
    folder: Path, *, base: str | Path = "tiny", rank: int = 4, seed: int = 0, norm_stats: dict[str, Any] | None = None
) -> Path:
    random_lora(load_model(base), rank=rank, seed=seed).write(folder, base=str(base), norm_stats=norm_stats)
    return folder
