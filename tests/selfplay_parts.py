"""A tiny policy with adapters that do something, and ragged batches: what the tests of scoring and step share."""

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import torch
from policy_parts import random_lora

from spvla.config import StepConfig
from spvla.model.lora_file import LoraFile
from spvla.model.openvla import OpenVLA
from spvla.policies.checkpoint import load_model
from spvla.policies.openvla.presets import initialise, preset
from spvla.train.reference_store import ReferenceStore
from spvla.train.scoring import REAL_ROWS, Inputs
from spvla.train.step import Learner
from spvla.types import ACTION_DIM, Batch

PAD = 32_000


def tiny_core() -> OpenVLA:
    return deepcopy(_core())


def tiny_lora(seed: int = 0, *, rank: int = 4, strength: float = 0.05) -> LoraFile:
    """An adapter that does something, each seed's another."""
    return random_lora(_core(), rank=rank, seed=seed, strength=strength)


def tiny_learner(
    config: StepConfig, *, opponent: LoraFile | None = None, answers: ReferenceStore | None = None, rank: int = 4
) -> Learner:
    """Of a policy with an adapter, or whose every weight is trained; against the base, or another adapter."""
    policy = tiny_lora(rank=rank) if config.use_lora else None
    return Learner(tiny_core(), config, policy=policy, opponent=opponent, answers=answers)


@cache
def _core() -> OpenVLA:
    """Built once: a copy is much quicker than new random weights."""
    model = OpenVLA(preset("tiny"))
    initialise(model, 0)
    return model.eval().requires_grad_(False)


def ragged_batch(size: int = 3, *, seed: int = 0, actions: np.ndarray | None = None, even: bool = False) -> Batch:
    """Prompts of different lengths (equal ones if `even`), right-padded, with random images and action tokens."""
    rng = np.random.default_rng(seed)
    prompts = np.full(size, 9) if even else rng.integers(4, 12, size)
    width = prompts.max() + ACTION_DIM + 1
    ids = np.full((size, width), PAD)
    for i, prompt in enumerate(prompts):
        action = rng.integers(31_744, 32_000, ACTION_DIM) if actions is None else actions[i]
        row = [1, *rng.integers(3, 29_000, prompt - 2), 29_871, *action, 2]
        ids[i, : len(row)] = row
    return Batch(
        images=rng.integers(0, 256, (size, 1, 224, 224, 3), dtype=np.uint8),
        input_ids=ids.astype(np.int64),
        lengths=prompts.astype(np.int64) + ACTION_DIM + 1,
        actions=np.zeros((size, 1, ACTION_DIM), np.float32),
        samples=np.arange(size, dtype=np.int64) + 100 * seed,
    )


def take_step(learner: Learner, *batches: Batch) -> dict[str, float]:
    """One optimiser step over micro-batches that the opponent answers right before."""
    (scored,) = learner.prepare([batches])
    return learner.step(scored).read()


def take(batch: Batch, rows: slice) -> Batch:
    """Some samples of a batch."""
    return Batch(**{name: None if value is None else value[rows] for name, value in vars(batch).items()})


def join(*batches: Batch) -> Batch:
    """Batches of one width as one."""
    held = [name for name, value in vars(batches[0]).items() if value is not None]
    return Batch(**{name: np.concatenate([getattr(b, name) for b in batches]) for name in held})


def golden_core(golden: Path) -> OpenVLA:
    """The reference outputs' own tiny model."""
    return load_model(golden / "model")


def golden_inputs(arrays: Mapping[str, np.ndarray]) -> Inputs:
    """The reference's training batch of four, from its pixel values on."""
    ids, start = arrays["train_input_ids"].astype(np.int64), arrays["train_attention_mask"].sum(1) - REAL_ROWS
    targets = torch.from_numpy(np.take_along_axis(ids, start[:, None] + np.arange(REAL_ROWS), 1))
    return Inputs(
        pixels=torch.from_numpy(arrays["train_pixel_values"]),
        text=torch.from_numpy(ids[:, :-1]),
        start=torch.from_numpy(start.astype(np.int64)),
        targets=targets,
        real=targets[:, :ACTION_DIM],
    )
