"""Weights in 8 and 4 bits: near the float's numbers, and adapters beside them.

bitsandbytes runs on a CPU too, if slowly; so what `load_in_8bit` and `load_in_4bit` do is tested without their GPU.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from policy_parts import requests, write_adapter

import spvla
from spvla.policies import checkpoint
from spvla.policies.openvla.policy import OpenVLAPolicy

BITS = pytest.mark.parametrize(("bits", "weights", "error"), [(8, torch.int8, 0.05), (4, torch.uint8, 0.4)])


def in_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> OpenVLAPolicy:
    monkeypatch.setattr(checkpoint, "require_quantiser", lambda **_: None)  # which asks for a GPU
    return spvla.load_policy("tiny", **{f"load_in_{bits}bit": True})


@BITS
def test_a_policy_in_few_bits_is_near_the_one_in_floats(
    bits: int, weights: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All maps but lm_head are smaller by 32 / bits; the first logits are off by 2% in 8 bits, 28% in 4."""
    ours, exact = in_bits(bits, monkeypatch), spvla.load_policy("tiny")
    up, its = (p.model.language_model.model.layers[0].mlp.gate_up_proj.weight for p in (ours, exact))
    assert up.dtype == weights and up.nbytes == its.nbytes * bits // 32
    assert torch.equal(ours.model.language_model.lm_head.weight, exact.model.language_model.lm_head.weight)
    a, b = (p.decode(*requests(2), logits=True)[1][:, 0] for p in (ours, exact))  # of the first token: equal prefixes
    assert 0 < np.linalg.norm(a - b) / np.linalg.norm(b) < error


@BITS
def test_an_adapter_acts_on_weights_of_few_bits(
    bits: int, weights: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beside it the base keeps its bits; and what it adds is what it adds to floats, within the rounding of both."""
    adapter = write_adapter(tmp_path / "a", base=checkpoint.resolve("tiny"), norm_stats={})
    ours, exact = in_bits(bits, monkeypatch), spvla.load_policy("tiny")
    alone = ours.decode(*requests(2), logits=True)[1]
    added = []
    for policy in (ours, exact):
        policy.add_adapter("a", adapter)
        base = policy.decode(*requests(2), logits=True)[1]
        added.append(policy.decode(*requests(2), logits=True, adapters=["a", "a"])[1][:, 0] - base[:, 0])
        if policy is ours:
            assert np.array_equal(base, alone)
    cosine = np.vdot(*added) / np.linalg.norm(added[0]) / np.linalg.norm(added[1])
    assert cosine > 1 - error
