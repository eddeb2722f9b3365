"""What only a GPU runs: kernels and graphs of our own give what the plain code gives."""

import math
from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import pytest
import torch
from policy_parts import reference_model, requests
from selfplay_parts import ragged_batch, take_step, tiny_model

from spvla.config import StepConfig
from spvla.policy.attend import attend_new
from spvla.policy.policy import OpenVLAPolicy
from spvla.policy.prompt import build_tiny_tokenizer
from spvla.selfplay.step import Learner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_new_token_attends_as_with_torchs_attention(dtype: torch.dtype, close: float) -> None:
    rows, heads, slots, width = 5, 4, 150, 128
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, 1, heads, width, generator=generator).transpose(1, 2) for _ in range(3))
    keys, values = (torch.randn(rows, heads, slots, width, generator=generator) for _ in range(2))
    at = torch.tensor([0, 1, 63, 64, 149])
    ours = [t.to(dtype).cuda() for t in (q, k, v, keys, values)]
    out = attend_new(*ours, at.cuda())
    wanted = attend_new(q, k, v, keys, values, at)
    assert torch.allclose(out.float().cpu(), wanted, atol=close)
    assert torch.equal(ours[3].cpu(), keys.to(dtype)) and torch.equal(ours[4].cpu(), values.to(dtype))


def test_a_row_attends_alike_wherever_in_the_batch_it_stands() -> None:
    rows, heads, slots, width = 16, 8, 300, 128
    tensors = [torch.randn(rows, heads, n, width).bfloat16().cuda() for n in (1, 1, 1, slots, slots)]
    at = torch.randint(0, slots, (rows,)).cuda()
    order = torch.randperm(rows).cuda()
    moved = attend_new(*(t[order].clone() for t in tensors), at[order])
    assert torch.equal(moved, attend_new(*tensors, at)[order])


def test_one_graph_decodes_as_the_plain_code_does() -> None:
    model = reference_model().requires_grad_(False).cuda()
    images, instructions = requests(8)
    tokenizer = build_tiny_tokenizer()
    plain = OpenVLAPolicy(model=model, tokenizer=tokenizer, norm_stats={}, name="plain")
    graph = OpenVLAPolicy(model=model, tokenizer=tokenizer, norm_stats={}, name="graph", decode_batch_size=8)
    wanted = plain.decode(images, instructions)
    assert np.array_equal(graph.decode(images, instructions), wanted)
    assert np.array_equal(graph.decode(images[3:5], instructions[3:5]), wanted[3:5])


@pytest.mark.parametrize("heat", [0.0, 2.0])
def test_batches_started_before_any_is_read_decode_as_one_after_another(heat: float) -> None:
    model = reference_model().requires_grad_(False).cuda()
    images, instructions = requests(4)
    kind = {"tokenizer": build_tiny_tokenizer(), "norm_stats": {}, "name": "graph", "decode_batch_size": 2}
    policy = OpenVLAPolicy(model=model, **kind)
    together = policy.decode(images, instructions, temperature=heat, seeds=range(4))
    halves = [slice(0, 2), slice(2, 4)]
    apart = [policy.decode(images[h], instructions[h], temperature=heat, seeds=range(4)[h]) for h in halves]
    assert np.array_equal(together, np.concatenate(apart))


def test_an_opponent_asked_for_several_steps_answers_as_on_a_cpu() -> None:
    model = tiny_model("policy", "opponent")
    config = StepConfig(opponent_temperature=1.0)
    coming = [[ragged_batch(3, seed=seed)] for seed in range(3)]
    wanted, found = (Learner(m, config).ask(coming) for m in (model, deepcopy(model).cuda()))
    for (ours,), (theirs,) in zip(found, wanted, strict=True):
        assert torch.equal(ours.reply.generated.cpu(), theirs.reply.generated)
        assert torch.allclose(ours.reply.real_logps.cpu(), theirs.reply.real_logps, atol=1e-3)
        assert torch.allclose(ours.reply.generated_logps.cpu(), theirs.reply.generated_logps, atol=1e-3)


def test_a_step_equals_a_cpus_and_is_skipped_alike() -> None:
    model, batch = tiny_model("policy", "opponent"), ragged_batch(3)
    here, there = (Learner(m, StepConfig(beta=0.5, max_grad_norm=1.0)) for m in (model, deepcopy(model).cuda()))
    for _ in range(2):
        wanted, found = take_step(here, batch), take_step(there, batch)
        for name in ("total_loss", "grad_norm", "policy_real_logps", "policy_generated_logps", "margin"):
            assert found[name] == pytest.approx(wanted[name], abs=1e-2, rel=1e-3)
    before, site = there.state_dict(), there.network.sites["lm_head"]
    there.network.sites["lm_head"] = site._replace(weight=site.weight + math.nan)
    assert take_step(there, batch)["skipped"] == 1
    after = there.state_dict()
    assert torch.equal(after["policy"], before["policy"])
    assert all(torch.equal(after["moments"][name], value) for name, value in before["moments"].items())


def test_a_step_does_not_wait_for_the_device() -> None:
    learner = Learner(tiny_model("policy", "opponent").cuda(), StepConfig(beta=0.5, max_grad_norm=1.0))
    take_step(learner, ragged_batch(3))  # kernels are compiled
    (questions,) = learner.ask([[ragged_batch(3)]])
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = learner.step(questions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(pending.read()["total_loss"])
