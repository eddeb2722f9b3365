"""What the tests of the OpenVLA-OFT family share: small inputs, the reference weights of head and projector."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from policy_parts import REFERENCE, reference_weight

from spvla.policies.oft.chunks import prompt_text
from spvla.policies.oft.network import OftInputs, OftNetwork
from spvla.policies.openvla.images import to_pixel_values


def enlarge(image: np.ndarray) -> np.ndarray:
    """(56, 56, 3) -> (224, 224, 3), each pixel 4 x 4 times."""
    return image.repeat(4, 0).repeat(4, 1)


def load_parts(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "oft/pt/dataset_statistics.json").read_text())["libero_spatial_no_noops"]


def oft_inputs(images: Sequence[np.ndarray], ids: list[int], *, proprio: np.ndarray | None = None) -> OftInputs:
    text, start = prompt_text([ids], 56)
    return OftInputs(
        pixels=to_pixel_values(np.stack(images))[None],
        proprio=None if proprio is None else torch.from_numpy(proprio)[None].float(),
        text=torch.from_numpy(text),
        start=torch.from_numpy(start),
    )


@torch.no_grad()
def reference_parts(network: OftNetwork) -> OftNetwork:
    """Gives head and projector the weights that the original ran with, which its head's file holds in bfloat16."""
    for part in ("action_head", "proprio_projector"):
        for name, parameter in getattr(network, part).named_parameters():
            value = reference_weight(f"{part}.module.{name}", parameter.shape)
            parameter.copy_(value.bfloat16() if part == "action_head" else value)
    return network


@cache
def reference_oft() -> dict[str, Any]:
    return json.loads((REFERENCE / "oft.json").read_text())
