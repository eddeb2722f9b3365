"""Chunks on a GPU: a recorded pass answers as a plain one, and no chunk depends on who shares its batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oft_parts import chunk_batch, create_oft, observations, write_oft_adapter
from selfplay_parts import take_step, tiny_core

from spvla.config import StepConfig
from spvla.policies.oft.form import OftForm
from spvla.policies.oft.network import OpenVLAOFT
from spvla.policies.registry import load_policy
from spvla.train.step import Learner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FORMS = [
    OftForm(cameras=2, proprio=True, action_tokens_only=True, learned_slots=True),
    OftForm(cameras=2, proprio=True, head="l1"),
]


@pytest.fixture(scope="module", params=FORMS, ids=["discrete", "l1"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_oft(tmp_path_factory.mktemp("oft") / "base", request.param)


def test_a_recorded_pass_in_float32_answers_as_a_cpu_does(folder: Path) -> None:
    asked = observations(5)
    here = load_policy(folder).act(asked, unnorm_key="suite")
    there = load_policy(folder, device="cuda", decode_batch_size=3).act(asked, unnorm_key="suite")
    assert np.mean(np.abs(here - there) > 1e-2) < 0.02  # a token on the edge of two may fall either way


def test_in_bfloat16_no_bit_depends_on_the_grouping(folder: Path) -> None:
    policy, asked = load_policy(folder, device="cuda", dtype="bfloat16", decode_batch_size=8), observations(16)
    policy.prepare([o.instruction for o in asked])
    together = policy.act(asked, unnorm_key="suite")
    order = np.random.default_rng(0).permutation(16)
    shuffled = np.concatenate(
        [policy.act([asked[i] for i in part], unnorm_key="suite") for part in np.split(order, [1, 4, 9])]
    )
    assert np.array_equal(shuffled, together[order])


def test_resident_adapters_change_nobody_elses_bits(folder: Path, tmp_path: Path) -> None:
    policy, asked = load_policy(folder, device="cuda", dtype="bfloat16", decode_batch_size=4), observations(4)
    for i in (1, 2):
        policy.add_adapter(f"a{i}", write_oft_adapter(tmp_path / f"a{i}", folder, seed=i))
    names = ["a1", None, "a2", "a1"]
    mixed = policy.act(asked, unnorm_key="suite", adapters=names)
    for i, name in enumerate(names):
        assert np.array_equal(mixed[i], policy.act(asked, unnorm_key="suite", adapters=[name] * 4)[i])
    assert not np.array_equal(mixed[0], policy.act(asked, unnorm_key="suite", adapters=[None] * 4)[0])


def test_a_recorded_pass_reads_the_adapter_that_has_the_slot_now(folder: Path, tmp_path: Path) -> None:
    policy, asked = load_policy(folder, device="cuda", decode_batch_size=4), observations(4)
    adapters = [write_oft_adapter(tmp_path / f"a{i}", folder, seed=i) for i in range(3)]
    policy.add_adapter("stays", adapters[0])
    policy.add_adapter("old", adapters[1])
    old = policy.act(asked, unnorm_key="suite", adapters=["old"] * 4)
    policy.remove_adapter("old")
    policy.add_adapter("new", adapters[2])
    new = policy.act(asked, unnorm_key="suite", adapters=["new"] * 4)
    alone = load_policy(folder, device="cuda", decode_batch_size=4)
    alone.add_adapter("new", adapters[2])
    assert np.array_equal(new, alone.act(asked, unnorm_key="suite", adapters=["new"] * 4))
    assert not np.array_equal(new, old)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=["discrete", "l1"])
def test_steps_in_bfloat16_follow_a_cpu_in_float32_and_wait_for_nothing(form: OftForm, compiled: bool) -> None:
    config = StepConfig(objective="sft", use_lora=False, learning_rate=1e-3, max_grad_norm=1.0)
    batch = chunk_batch(4)
    here, there = (OpenVLAOFT.around(tiny_core(), form) for _ in range(2))
    on_cpu = Learner(here, config)
    on_gpu = Learner(there.cuda().bfloat16(), replace(config, compile=compiled))
    for _ in range(3):
        wanted = take_step(on_cpu, batch)
        (micro_batches,) = on_gpu.prepare([[batch]])
        torch.cuda.set_sync_debug_mode("error" if on_gpu.steps else "default")  # the first step compiles
        try:
            pending = on_gpu.step(micro_batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert pending.read()["train_loss"] == pytest.approx(wanted["train_loss"], rel=3e-2)
