"""One pass over a shared prefix against two plain passes through the model, gradients included; and the opponent."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from selfplay_parts import golden_core, golden_inputs, ragged_batch, take, tiny_core, tiny_lora
from torch import Tensor
from torch.func import functional_call

from spvla.model.linear import joined_maps
from spvla.model.lora_file import LoraFile
from spvla.model.openvla import OpenVLA
from spvla.model.vision import NUM_PATCHES
from spvla.policies.openvla.images import to_pixel_values
from spvla.train.flat import FlatLora
from spvla.train.losses import token_logps
from spvla.train.network import Network
from spvla.train.opponent import Opponent
from spvla.train.reference_store import ReferenceStore
from spvla.train.scoring import ReferenceOutput, TokenSampler, draw_uniforms, score_pair, score_real, to_inputs
from spvla.types import ACTION_DIM, Batch

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = TokenSampler()


def plain_logps(model: OpenVLA, batch: Batch, actions: Tensor, lora: LoraFile | None = None) -> Tensor:
    """Log-probs (B, A) of `actions` by an ordinary teacher-forced pass with a padding mask, the adapter merged."""
    ids, lengths = torch.from_numpy(batch.input_ids).clone(), torch.from_numpy(batch.lengths)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    start = lengths - ACTION_DIM - 1
    columns = start[:, None] + torch.arange(ACTION_DIM)
    ids.scatter_(1, columns, actions)
    weights = {} if lora is None else merged(model, lora)
    logits = functional_call(model, weights, (to_pixel_values(batch.images[:, 0]), ids, mask)).logits
    rows = NUM_PATCHES + columns - 1
    return token_logps(logits.gather(1, rows[..., None].expand(-1, -1, logits.shape[-1])), actions)


def merged(model: OpenVLA, lora: LoraFile) -> dict[str, Tensor]:
    """The model's weights with the adapter in them, by the definition: W + scale B A."""
    return {
        f"{path}.weight": maps[0].module.weight
        + torch.cat([lora.delta(m.name) for m in maps]).view_as(maps[0].module.weight)
        for path, maps in joined_maps(model).items()
    }


def real_of(batch: Batch) -> Tensor:
    return to_inputs(batch, "cpu").real


@pytest.mark.parametrize("adapted", [False, True])
def test_one_pass_over_a_pair_equals_two_plain_passes(adapted: bool) -> None:
    model, batch, lora = tiny_core(), ragged_batch(4), tiny_lora() if adapted else None
    generated = real_of(batch).roll(1, 0)
    with torch.no_grad(), nullcontext() if lora is None else FlatLora(model, lora, trainable=False).attached():
        pair = score_pair(Network(model=model), to_inputs(batch, "cpu"), generated)
    with torch.no_grad():
        real, theirs = (plain_logps(model, batch, ids, lora) for ids in (real_of(batch), generated))
    torch.testing.assert_close(token_logps(pair.real[:, :ACTION_DIM], real_of(batch)), real, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(token_logps(pair.generated, generated), theirs, atol=1e-5, rtol=1e-5)


def test_gradients_of_one_pass_equal_those_of_two_plain_passes() -> None:
    model, batch, lora = tiny_core(), ragged_batch(3), tiny_lora()
    weights = torch.randn(2, 3, ACTION_DIM, generator=torch.Generator().manual_seed(0))
    generated = real_of(batch).roll(1, 0)

    factors = {name: tuple(t.clone().requires_grad_() for t in pair) for name, pair in lora.factors.items()}
    watched = replace(lora, factors=factors)
    both = torch.stack([plain_logps(model, batch, ids, watched) for ids in (real_of(batch), generated)])
    (both * weights).sum().backward()

    ours = FlatLora(model, lora, trainable=True)
    with ours.attached():
        pair = score_pair(Network(model=model), to_inputs(batch, "cpu"), generated)
    real = token_logps(pair.real[:, :ACTION_DIM], real_of(batch))
    total = torch.zeros_like(ours.master)
    ours.add_gradient((torch.stack((real, token_logps(pair.generated, generated))) * weights).sum(), total)

    ours.master.copy_(total)  # so that the file has gradients for numbers
    compared = 0
    for name, pair in ours.to_file().factors.items():
        if factors[name][1].grad is not None:  # else a map that never runs
            for found, wanted in zip(pair, factors[name], strict=True):
                rounding = 1e-4 * wanted.grad.abs().max().item()
                torch.testing.assert_close(found, wanted.grad, atol=rounding, rtol=0, msg=name)
                compared += found.numel()
    assert compared == len(total)


def test_real_and_generated_do_not_see_each_other() -> None:
    model, batch = tiny_core(), ragged_batch(2)
    inputs, generated = to_inputs(batch, "cpu"), real_of(batch).flip(1)
    with torch.no_grad():
        before = score_pair(Network(model=model), inputs, generated)
        other_generated = score_pair(Network(model=model), inputs, generated.flip(0))
        other_real = score_pair(Network(model=model), to_inputs(swap_actions(batch), "cpu"), generated)
    assert torch.equal(before.real, other_generated.real)
    torch.testing.assert_close(before.generated, other_real.generated, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before.real[:, 1:7], other_real.real[:, 1:7])


def swap_actions(batch: Batch) -> Batch:
    ids, starts = batch.input_ids.copy(), batch.lengths - ACTION_DIM - 1
    for row, start in zip(ids, starts, strict=True):
        row[start : start + ACTION_DIM] = row[start : start + ACTION_DIM][::-1]
    return Batch(**{**vars(batch), "input_ids": ids})


def test_padding_changes_nothing() -> None:
    model, batch = tiny_core(), ragged_batch(3)
    generated = real_of(batch).flip(0)
    with torch.no_grad():
        plain = score_pair(Network(model=model), to_inputs(batch, "cpu"), generated)
        padded = score_pair(Network(model=model), to_inputs(batch, "cpu", width=30), generated)
        alone = score_pair(Network(model=model), to_inputs(take(batch, slice(1, 2)), "cpu"), generated[1:2])
    torch.testing.assert_close(plain.generated, padded.generated, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain.real[1:2], alone.real, atol=1e-5, rtol=1e-5)


def test_the_greedy_reply_is_the_most_probable_token_after_each_of_its_own() -> None:
    model, batch, lora = tiny_core(), ragged_batch(3), tiny_lora()
    adapter = FlatLora(model, lora, trainable=False)
    with torch.no_grad(), adapter.attached():
        reply = Opponent(Network(model=model), GREEDY).reply(to_inputs(batch, "cpu"), torch.zeros(3, ACTION_DIM))
        pair = score_pair(Network(model=model), to_inputs(batch, "cpu"), reply.generated)
    assert torch.equal(pair.generated.argmax(-1), reply.generated)
    torch.testing.assert_close(reply.generated_logps, token_logps(pair.generated, reply.generated), atol=1e-5, rtol=0)
    with torch.no_grad():
        real, own = (plain_logps(model, batch, ids, lora) for ids in (real_of(batch), reply.generated))
    torch.testing.assert_close(reply.real_logps, real, atol=1e-5, rtol=0)
    torch.testing.assert_close(reply.generated_logps, own, atol=1e-5, rtol=0)


def test_a_reply_does_not_depend_on_the_real_action_nor_on_who_shares_the_batch() -> None:
    opponent, batch = Opponent(Network(model=tiny_core()), GREEDY), ragged_batch(3)
    uniforms = torch.zeros(3, ACTION_DIM)
    reply = opponent.reply(to_inputs(batch, "cpu"), uniforms)
    assert torch.equal(reply.generated, opponent.reply(to_inputs(swap_actions(batch), "cpu"), uniforms).generated)
    alone = opponent.reply(to_inputs(take(batch, slice(2, 3)), "cpu"), uniforms[2:])
    assert torch.equal(reply.generated[2:], alone.generated)


def test_sampling_follows_the_softmax_at_its_temperature() -> None:
    """20000 draws from four ids: each frequency within five standard errors of softmax(logits / 2)."""
    logits, count = torch.tensor([0.0, 1.0, 2.0, -1.0]), 20_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(count))
    ids = TokenSampler(temperature=2.0).choose(logits.expand(count, -1), uniform)
    p = (logits / 2).softmax(-1)
    assert ((ids.bincount(minlength=4) / count - p).abs() < 5 * (p * (1 - p) / count).sqrt()).all()
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    edges = TokenSampler(temperature=1.0).choose(logits.expand(2, -1), ends)
    assert edges.tolist() == [0, 3]


def test_samples_are_drawn_by_seed_visit_and_sample_alone() -> None:
    draws = draw_uniforms(7, 3, np.array([5, 9]))
    assert draws.shape == (2, ACTION_DIM) and (draws < 1).all()
    assert np.array_equal(draws[1:], draw_uniforms(7, 3, np.array([9])))
    for other in (draw_uniforms(8, 3, np.array([5])), draw_uniforms(7, 4, np.array([5]))):
        assert not np.array_equal(draws[:1], other)


def test_the_original_models_loss(golden: Path) -> None:
    arrays, model = np.load(golden / "model" / "golden.npz"), golden_core(golden)
    inputs = golden_inputs(arrays)
    with torch.no_grad():
        loss = -token_logps(score_real(Network(model=model), inputs), inputs.targets).mean().item()
    assert loss == pytest.approx(arrays["train_loss"], abs=1e-5)


def test_answers_are_kept_by_sample_and_forgotten_with_their_opponent(tmp_path: Path) -> None:
    path, samples = tmp_path / "answers" / "rank_0.bin", np.array([4, 2])
    reply = ReferenceOutput(
        generated=torch.tensor([[31_744] * 7, [31_999] * 7]),
        real_logps=torch.randn(2, 7),
        generated_logps=torch.randn(2, 7),
    )
    store = ReferenceStore(path, num_samples=6, key="opponent a")
    assert store.get(samples, "cpu") is None
    store.put(samples, reply)
    again = ReferenceStore(path, num_samples=6, key="opponent a")
    for name in ("generated", "real_logps", "generated_logps"):
        assert torch.equal(getattr(again.get(samples, "cpu"), name), getattr(reply, name))
        assert torch.equal(getattr(again.get(samples[::-1].copy(), "cpu"), name), getattr(reply, name).flip(0))
    assert again.get(np.array([4, 5]), "cpu") is None
    assert ReferenceStore(path, num_samples=6, key="opponent b").get(samples, "cpu") is None
