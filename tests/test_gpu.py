"""What only a GPU runs: kernels and graphs of our own give what the plain code gives."""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from policy_parts import reference_model, requests, write_adapter
from selfplay_parts import ragged_batch, take_step, tiny_core, tiny_lora
from torch import Tensor

import spvla
from spvla.config import StepConfig
from spvla.model.attention import Packing, attend_new, attend_prompts, rotary
from spvla.model.kernels.compiled import quack_version
from spvla.model.openvla import OpenVLA
from spvla.model.vision import TowerConfig, VisionBlock
from spvla.policies.openvla.policy import OpenVLAPolicy
from spvla.policies.openvla.presets import initialise, preset
from spvla.policies.openvla.prompt import build_tiny_tokenizer
from spvla.train.flat import Flat
from spvla.train.optimizer import Optimizer
from spvla.train.step import Learner

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


def packed_prompts(lengths: list[int], slots: int) -> tuple[list[Tensor], Packing]:
    """q, k, v (N, H, K) of prompts of these lengths, and where they stand."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 4, 128, generator=generator).unbind(1)
    places = torch.cat([row * slots + torch.arange(n) for row, n in enumerate(lengths)])
    return list(qkv), Packing(starts=torch.tensor([0, *lengths]).cumsum(0).int(), places=places)


def on_gpu(packing: Packing) -> Packing:
    return Packing(starts=packing.starts.cuda(), places=packing.places.cuda())


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_packed_prompts_attend_as_with_torchs_attention(dtype: torch.dtype, close: float) -> None:
    lengths, slots = [1, 63, 64, 65, 150], 150
    qkv, packing = packed_prompts(lengths, slots)
    rope = tuple(t[0, :, 0] for t in rotary(torch.arange(slots)[None], 128, 10_000.0))
    wanted_cache, cache = (
        [torch.zeros(5, slots, 4, 128, dtype=kind, device=device).transpose(1, 2) for _ in range(2)]
        for kind, device in ((torch.float32, "cpu"), (dtype, "cuda"))
    )
    wanted = attend_prompts(*qkv, rope, *wanted_cache, packing)
    out = attend_prompts(*(t.to(dtype).cuda() for t in qkv), tuple(t.cuda() for t in rope), *cache, on_gpu(packing))
    assert torch.allclose(out.float().cpu(), wanted, atol=close)
    for ours, theirs in zip(cache, wanted_cache, strict=True):
        assert torch.allclose(ours.float().cpu(), theirs, atol=close)


def test_a_prompt_attends_alike_whichever_prompts_are_packed_beside_it() -> None:
    slots, rope = 150, (torch.randn(150, 128).cuda(), torch.randn(150, 128).cuda())

    def outputs(qkv: list[Tensor], packing: Packing) -> Tensor:
        cache = [torch.zeros(3, slots, 4, 128).bfloat16().cuda().transpose(1, 2) for _ in range(2)]
        return attend_prompts(*(t.bfloat16().cuda() for t in qkv), rope, *cache, on_gpu(packing))

    lengths = [140, 20, 90]
    qkv, packing = packed_prompts(lengths, slots)
    first, second, third = outputs(qkv, packing).split(lengths)
    backwards = [torch.cat(list(reversed(t.split(lengths)))) for t in qkv]
    assert torch.equal(outputs(backwards, packed_prompts(lengths[::-1], slots)[1]), torch.cat((third, second, first)))


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


def test_a_requests_bits_do_not_depend_on_the_padding_that_its_batch_leaves_out() -> None:
    model = OpenVLA(preset("tiny")).eval().requires_grad_(False).bfloat16()
    initialise(model, 0)
    policy = OpenVLAPolicy(
        model=model.cuda(), tokenizer=build_tiny_tokenizer(), norm_stats={}, name="graph", decode_batch_size=4
    )
    images, instructions = requests(5)
    policy.prepare(instructions)
    seen = [  # the third request, beside others that are shorter or longer than it
        policy.decode([images[i] for i in (2, *others)], [instructions[i] for i in (2, *others)], logits=True)[1][0]
        for others in ([2, 2, 2], [4, 4, 4], [0, 1, 3], [])
    ]
    assert len(policy._decoder.graphs) > 2  # of several sizes
    assert all(np.array_equal(logits, seen[0]) for logits in seen[1:])


@pytest.fixture
def hopper() -> ModuleType:
    if quack_version(torch.bfloat16) is None:
        pytest.skip("needs a Hopper GPU and the extra 'hopper'")
    from spvla.model.kernels import hopper

    return hopper


def far(ours: Tensor, wanted: Tensor) -> float:
    return ((ours.float() - wanted.float()).norm() / wanted.float().norm()).item()


def test_a_gate_finished_in_its_product_is_the_gate_of_a_products_result(hopper: ModuleType) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(1500, 512).cuda(), torch.randn(2 * 344, 512).cuda() / 16
    gate, up = torch.nn.functional.linear(x, weights).chunk(2, -1)
    ours = hopper.gated(x.bfloat16(), weights.bfloat16())
    assert far(ours, torch.nn.functional.silu(gate) * up) < 1e-2
    assert torch.equal(hopper.gated(x[200:1300].bfloat16(), weights.bfloat16()), ours[200:1300])  # whoever is beside it


@pytest.mark.parametrize("layer_scale", [True, False])
def test_a_towers_block_is_the_same_fused(hopper: ModuleType, layer_scale: bool) -> None:
    torch.manual_seed(0)
    config = TowerConfig(width=72, depth=1, num_heads=2, mlp_hidden=200, layer_scale=layer_scale)
    block = VisionBlock(config).requires_grad_(False).cuda()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(5, 261, 72).cuda()
    ours = hopper.run_block(deepcopy(block).bfloat16(), x.bfloat16())
    assert far(ours - x.bfloat16(), block(x) - x) < 2e-2


def test_the_base_has_its_bits_beside_adapters_too(tmp_path: Path) -> None:
    policy = spvla.load_policy("tiny", device="cuda", dtype="bfloat16", decode_batch_size=4)
    images, instructions = requests(4)
    policy.prepare(instructions)
    base = policy.decode(images, instructions, logits=True)[1]
    policy.add_adapter("v0", write_adapter(tmp_path / "v0"))
    mixed = policy.decode(images, instructions, logits=True, adapters=[None, "v0", None, "v0"])[1]
    assert np.array_equal(mixed[[0, 2]], base[[0, 2]])
    assert not np.array_equal(mixed[[1, 3]], base[[1, 3]])


@pytest.mark.parametrize(("bits", "error"), [(8, 0.05), (4, 0.5)])
def test_weights_of_few_bits_decode_in_a_bucket(bits: int, error: float) -> None:
    pytest.importorskip("bitsandbytes")
    kind = {"device": "cuda", "dtype": "bfloat16", "decode_batch_size": 4}
    policy, exact = spvla.load_policy("tiny", **kind, **{f"load_in_{bits}bit": True}), spvla.load_policy("tiny", **kind)
    images, instructions = requests(4)
    ours, wanted = (p.decode(images, instructions, logits=True)[1] for p in (policy, exact))
    assert far(*(torch.from_numpy(logits[:, 0]) for logits in (ours, wanted))) < error
    if bits == 4:  # LLM.int8 looks for outliers over all rows of a batch
        assert np.array_equal(policy.decode(images[2:], instructions[2:], logits=True)[1], ours[2:])


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


def two_adapters(config: StepConfig, device: str) -> Learner:
    return Learner(tiny_core().to(device), config, policy=tiny_lora(0), opponent=tiny_lora(1))


def test_an_opponent_asked_for_several_steps_answers_as_on_a_cpu() -> None:
    config = StepConfig(opponent_temperature=1.0)
    coming = [[ragged_batch(3, seed=seed)] for seed in range(3)]
    wanted, found = (two_adapters(config, device).prepare(coming) for device in ("cpu", "cuda"))
    for (ours,), (theirs,) in zip(found, wanted, strict=True):
        assert torch.equal(ours.reference.generated.cpu(), theirs.reference.generated)
        assert torch.allclose(ours.reference.real_logps.cpu(), theirs.reference.real_logps, atol=1e-3)
        assert torch.allclose(ours.reference.generated_logps.cpu(), theirs.reference.generated_logps, atol=1e-3)


def test_a_step_equals_a_cpus_and_is_skipped_alike() -> None:
    batch, config = ragged_batch(3), StepConfig(beta=0.5, max_grad_norm=1.0)
    here, there = (two_adapters(config, device) for device in ("cpu", "cuda"))
    for _ in range(2):
        wanted, found = take_step(here, batch), take_step(there, batch)
        for name in ("total_loss", "grad_norm", "policy_real_logps", "policy_generated_logps", "margin"):
            assert found[name] == pytest.approx(wanted[name], abs=1e-2, rel=1e-3)
    before = there.state_dict()
    there.network.model.language_model.lm_head.weight.fill_(math.nan)
    assert take_step(there, batch)["skipped"] == 1
    after = there.state_dict()
    assert torch.equal(after["policy"], before["policy"])
    assert all(torch.equal(after["moments"][name], value) for name, value in before["moments"].items())


def test_a_step_does_not_wait_for_the_device() -> None:
    learner = two_adapters(StepConfig(beta=0.5, max_grad_norm=1.0), "cuda")
    take_step(learner, ragged_batch(3))  # kernels are compiled
    (batches,) = learner.prepare([[ragged_batch(3)]])
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = learner.step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(pending.read()["total_loss"])


@pytest.mark.parametrize("compiled", [False, True])
def test_learning_every_weight_in_bfloat16_follows_a_cpu_in_float32_and_waits_for_nothing(compiled: bool) -> None:
    flags = {"learning_rate": 1e-3, "loss_columns": "action", "weight_decay_on": "matrices", "max_grad_norm": 1.0}
    config, batch = StepConfig(objective="sft", use_lora=False, **flags), ragged_batch(4)
    here = Learner(tiny_core(), config)
    there = Learner(tiny_core().cuda().bfloat16(), replace(config, compile=compiled))
    for _ in range(4):
        wanted = take_step(here, batch)
        (batches,) = there.prepare([[batch]])
        torch.cuda.set_sync_debug_mode("error" if there.steps else "default")  # the first step compiles
        try:
            pending = there.step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert pending.read()["train_loss"] == pytest.approx(wanted["train_loss"], rel=2e-2)


def test_the_gradients_norm_is_that_of_float64() -> None:
    gradient = torch.randn(50_000_000, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * 1e-3
    optimizer = Optimizer(Flat([torch.zeros_like(gradient)], dtype=torch.float32, trainable=False), None, StepConfig())
    optimizer.gradient.copy_(gradient)
    norm = optimizer.update(torch.zeros((), device="cuda"), None, 0.0)["grad_norm"].item()
    assert norm == pytest.approx(gradient.double().norm().item(), rel=1e-6)
