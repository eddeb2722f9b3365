"""What the tests of the OpenVLA-OFT family share: small inputs, the reference weights of head and projector."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from policy_parts import REFERENCE, reference_model, reference_weight, reference_weights, requests, write_adapter

from spvla.policies.checkpoint import load_model
from spvla.policies.oft.checkpoint import save_checkpoint
from spvla.policies.oft.chunks import prompt_text
from spvla.policies.oft.folder import form_of
from spvla.policies.oft.form import OftForm
from spvla.policies.oft.heads import make_added
from spvla.policies.oft.network import OftInputs, OpenVLAOFT
from spvla.policies.oft.parts import write_added
from spvla.policies.openvla.images import to_pixel_values
from spvla.types import Batch, Observation


def enlarge(image: np.ndarray) -> np.ndarray:
    """(56, 56, 3) -> (224, 224, 3), each pixel 4 x 4 times."""
    return image.repeat(4, 0).repeat(4, 1)


def statistics(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "oft/pt/dataset_statistics.json").read_text())["libero_spatial_no_noops"]


def oft_inputs(images: Sequence[np.ndarray], ids: list[int], *, proprio: np.ndarray | None = None) -> OftInputs:
    text, start = prompt_text([ids], 56)
    return OftInputs(
        pixels=to_pixel_values(np.stack(images))[None],
        proprio=None if proprio is None else torch.from_numpy(proprio)[None].float(),
        text=torch.from_numpy(text),
        start=torch.from_numpy(start),
    )


def reference_oft_model(form: OftForm) -> OpenVLAOFT:
    """The tiny model of `reference_model` with head and projector as the original ran them: its head's file holds
    bfloat16."""
    model = OpenVLAOFT(reference_model().config, form)
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    added = {n for n in shapes if n.startswith(("action_head", "proprio_projector"))}
    weights = reference_weights({n: s for n, s in shapes.items() if n not in added})
    for name in added:
        part, _, key = name.partition(".")
        value = reference_weight(f"{part}.module.{key}", shapes[name])
        weights[name] = value.bfloat16().float() if part == "action_head" else value
    model.load_state_dict(weights)
    return model.eval()


@cache
def reference_oft() -> dict[str, Any]:
    return json.loads((REFERENCE / "oft.json").read_text())


STATS = {
    "suite": {
        "action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]},
        "proprio": {"q01": [-2.0] * 8, "q99": [2.0] * 8, "min": [-3.0] * 8, "max": [3.0] * 8},
    }
}


def create_oft(folder: Path, form: OftForm, *, seed: int = 0) -> Path:
    """A tiny checkpoint whose answers differ widely: its lm_head and head are not the small ones one begins to train
    with."""
    model = OpenVLAOFT.around(load_model("tiny"), form, seed=seed)
    with torch.no_grad():
        model.language_model.lm_head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(seed))
    save_checkpoint(model, folder, source="tiny", norm_stats=STATS)
    return folder


def write_oft_adapter(folder: Path, base: Path, *, seed: int) -> Path:
    """An adapter that changes what the policy does, with head and projector of its own."""
    write_adapter(folder, base=base, rank=4, seed=seed, norm_stats=STATS)
    form = form_of(base)
    write_added(make_added(form, load_model(base).config.llm.width, seed=seed), form, folder)
    return folder


def observations(count: int) -> list[Observation]:
    rng = np.random.default_rng(3)
    images, instructions = requests(2 * count)
    return [
        Observation(images=(images[2 * i], images[2 * i + 1]), instruction=instructions[i], proprio=rng.normal(size=8))
        for i in range(count)
    ]


def chunk_batch(size: int, *, answer: int | None = None, seed: int = 0) -> Batch:
    """Two cameras, states, prompts of different lengths, and chunks of random tokens, or all of one."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(4, 12, size)
    ids = np.full((size, prompts.max() + 57), 32_000)
    for row, prompt in zip(ids, prompts, strict=True):
        chunk = rng.integers(31_744, 32_000, 56) if answer is None else [answer] * 56
        row[: prompt + 57] = [1, *np.arange(3, 1 + prompt), 29_871, *chunk, 2]
    return Batch(
        images=np.random.default_rng(seed).integers(0, 256, (size, 2, 224, 224, 3), dtype=np.uint8),
        input_ids=ids.astype(np.int64),
        lengths=prompts.astype(np.int64) + 57,
        actions=np.zeros((size, 8, 7), np.float32),
        samples=np.arange(size, dtype=np.int64),
        proprio=rng.uniform(-1, 1, (size, 8)).astype(np.float32),
    )
