"""One update: exact to resume, the same on two workers as on one, not spoilt by a NaN."""

import itertools
import math
import multiprocessing
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from selfplay_parts import join, ragged_batch, take, take_step, tiny_core, tiny_learner, tiny_lora

from spvla.config import StepConfig
from spvla.errors import CheckpointError, TrainingError, UserError
from spvla.model.lora_file import LoraFile, fresh_lora
from spvla.policies.openvla.actions import encode
from spvla.train.flat import Flat
from spvla.train.losses import token_logps
from spvla.train.optimizer import Optimizer
from spvla.train.reference_store import ReferenceStore
from spvla.train.scoring import to_inputs
from spvla.train.settings import learning_rate
from spvla.train.step import Learner
from spvla.types import ACTION_DIM, Batch

pytestmark = pytest.mark.usefixtures("one_thread")

SPIN = StepConfig(beta=0.5, learning_rate=1e-3)


def trained(learner: Learner, steps: int, *, start: int = 0, size: int = 2) -> torch.Tensor:
    for i in range(start, start + steps):
        take_step(learner, ragged_batch(size, seed=i))
    return learner.policy.master.clone()


# --- objectives


def test_an_untrained_policy_loses_log_two_against_itself() -> None:
    """One y' scored by both: equal models, x = 0; in the fork's form too, where eta is 0."""
    for config in (SPIN, StepConfig(objective="spvla", beta=0.7, logp_reduction="mean")):
        model = tiny_core()
        fresh = fresh_lora(model, rank=4)  # B is zero
        metrics = take_step(Learner(model, config, policy=fresh), ragged_batch(3))
        assert metrics["selfplay_loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert metrics["total_loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert metrics["margin"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("objective", ["spin", "spvla", "sft"])
def test_repeated_steps_on_one_batch_lower_the_loss(objective: str) -> None:
    config = StepConfig(objective=objective, beta=0.5, learning_rate=5e-3, logp_reduction="mean")
    learner, batch = tiny_learner(config), ragged_batch(2)
    losses = [take_step(learner, batch)["total_loss"] for _ in range(6)]
    assert losses[-1] < 0.95 * losses[0]


def test_metrics_carry_the_names_of_the_original() -> None:
    metrics = take_step(tiny_learner(SPIN), ragged_batch(2))
    expected = "train_loss action_accuracy l1_loss normalized_loss selfplay_loss total_loss grad_norm margin"
    expected += " policy_real_logps policy_generated_logps opponent_real_logps opponent_generated_logps"
    expected += " action_logit_max action_logit_min real_rewards generated_rewards collision_rate"
    expected += " data_s opponent_s forward_s backward_s memory_gib"
    assert set(expected.split()) <= set(metrics)
    assert metrics["margin"] == pytest.approx(metrics["real_rewards"] - metrics["generated_rewards"], abs=1e-5)
    assert metrics["normalized_loss"] == pytest.approx(-metrics["policy_real_logps"] / ACTION_DIM, rel=1e-5)
    assert metrics["action_logit_min"] < metrics["action_logit_max"]


def collided_batch(learner: Learner, size: int) -> Batch:
    """A batch whose real actions are the opponent's own, but for the last sample."""
    batch = ragged_batch(size, even=True)
    inputs = to_inputs(batch, "cpu")
    own = learner.reference.answer(inputs, torch.zeros(size, ACTION_DIM)).generated.numpy()
    own[-1] = inputs.real[-1]
    start = int(inputs.start[0])
    ids = batch.input_ids.copy()
    ids[:, start : start + ACTION_DIM] = own
    return Batch(**{**vars(batch), "input_ids": ids})


def test_pairs_without_signal_are_counted_and_can_be_left_out_of_the_mean() -> None:
    """Of four pairs three collide. They have loss log 2 and no gradient, so leaving them out makes it four times."""
    kept, dropped = (tiny_learner(StepConfig(beta=0.5, drop_collisions=d)) for d in (False, True))
    batch = collided_batch(kept, 4)
    all_four, one = take_step(kept, batch), take_step(dropped, take(batch, slice(0, 2)), take(batch, slice(2, 4)))
    assert all_four["collision_rate"] == one["collision_rate"] == 0.75
    assert all_four["selfplay_loss"] == pytest.approx((3 * math.log(2) + one["selfplay_loss"]) / 4, abs=1e-5)
    assert one["grad_norm"] == pytest.approx(4 * all_four["grad_norm"], rel=1e-4)


def test_a_batch_of_collisions_alone_is_finite() -> None:
    learner = tiny_learner(StepConfig(beta=0.5, drop_collisions=True))
    metrics = take_step(learner, take(collided_batch(learner, 3), slice(0, 2)))
    assert metrics["collision_rate"] == 1 and metrics["total_loss"] == 0 and metrics["grad_norm"] == 0


def test_a_soft_cap_bounds_what_the_losses_see() -> None:
    """Capped at 1e-6 all 32064 tokens are alike, so a token's cross entropy is log 32064."""
    learner = tiny_learner(StepConfig(beta=0.5, logit_softcap=1e-6))
    metrics = take_step(learner, ragged_batch(2))
    assert metrics["train_loss"] == pytest.approx(math.log(32_064), abs=1e-4)
    assert metrics["policy_real_logps"] == pytest.approx(-7 * math.log(32_064), abs=1e-3)


# --- what spoils a step


def test_a_hard_batch_is_skipped_cleanly() -> None:
    learner = tiny_learner(StepConfig(beta=0.7, skip_hard_above=0.5))
    before = learner.policy.master.clone()
    metrics = take_step(learner, ragged_batch(2))  # cross entropy of an untrained model: about 10
    assert metrics["hard_rate"] == 1 and metrics["skipped"] == 1 and metrics["nonfinite_in_a_row"] == 0
    assert metrics["total_loss"] == 0 and math.isfinite(metrics["grad_norm"])
    assert torch.equal(learner.policy.master, before)
    easy = take_step(tiny_learner(StepConfig(beta=0.7, skip_hard_above=50.0)), ragged_batch(2))
    assert easy["hard_rate"] == 0 and easy["skipped"] == 0


def test_a_step_that_is_not_finite_is_skipped_counted_and_ends_the_run_after_three() -> None:
    learner = tiny_learner(StepConfig(beta=0.5, max_nonfinite_steps=3))
    good = trained(learner, 1)
    bias = learner.network.model.projector.fc1.bias
    sound = bias.clone()
    bias.fill_(math.nan)
    for count in (1, 2):
        metrics = take_step(learner, ragged_batch(2))
        assert metrics["skipped"] == 1 and metrics["nonfinite_in_a_row"] == count
    bias.copy_(sound)
    assert torch.equal(learner.policy.master, good)
    assert take_step(learner, ragged_batch(2))["nonfinite_in_a_row"] == 0  # one good step forgives
    bias.fill_(math.inf)
    with pytest.raises(TrainingError, match="3 steps in a row.*last checkpoint stays.*learning_rate"):
        trained(learner, 3)


@pytest.mark.parametrize("spoilt_by", ["nan", "hard"])
def test_a_skipped_step_changes_no_bit(spoilt_by: str) -> None:
    """Weights, moments, AdamW's count and the averaged opponent; the step after is as if it had not been."""
    config = StepConfig(beta=0.5, opponent_update="ema", ema_decay=0.5, max_grad_norm=1.0, skip_hard_above=50.0)
    learner, other = tiny_learner(config), tiny_learner(config)
    trained(learner, 1), trained(other, 1)
    before, bias = learner.state_dict(), learner.network.model.projector.fc1.bias
    sound = bias.clone()
    if spoilt_by == "nan":
        bias.fill_(math.nan)
    else:
        learner.objective.config = replace(config, skip_hard_above=0.5)
    assert take_step(learner, ragged_batch(2))["skipped"] == 1
    learner.objective.config = config
    bias.copy_(sound)
    after = learner.state_dict()
    for name in ("policy", "opponent"):
        assert torch.equal(after[name], before[name])
    for name, value in before["moments"].items():
        assert torch.equal(after["moments"][name], value)
    assert before["moments"]["step"] == 1
    assert torch.equal(trained(learner, 1, start=1), trained(other, 1, start=1))


def test_the_gradient_is_clipped_to_its_norm() -> None:
    """AdamW's first step does not depend on scale, but its moments do: exp_avg is 0.1 times the clipped gradient."""
    learner = tiny_learner(StepConfig(beta=0.5, max_grad_norm=1e-3))
    metrics = take_step(learner, ragged_batch(2))
    assert metrics["grad_norm"] > 1e-2
    moment = learner.optimizer.moments()["exp_avg"]
    assert (moment.norm() / 0.1).item() == pytest.approx(1e-3, rel=1e-3)


def test_the_gradients_norm_loses_no_small_terms() -> None:
    """5 million terms of 1e-4 beside one of 10: the norm is sqrt(100 + 0.05) = 10.0025, and 10 if they are lost."""
    optimizer = Optimizer(Flat([torch.zeros(5_000_000)], dtype=torch.float32, trainable=False), None, SPIN)
    optimizer.gradient.fill_(1e-4)
    optimizer.gradient[0] = 10.0
    norm = optimizer.update(torch.zeros(()), None, 0.0)["grad_norm"]
    assert norm.item() == pytest.approx(math.sqrt(100.05), rel=1e-6)


def test_weight_decay_can_spare_norms_biases_and_scales() -> None:
    """With a gradient of zero AdamW only decays: by 0.9 here, of all or of what has two dimensions."""
    flags = {"objective": "sft", "use_lora": False, "learning_rate": 0.5, "weight_decay": 0.2}
    for on, expected in (("all", 0.9), ("matrices", 1.0)):
        learner = Learner(tiny_core(), StepConfig(weight_decay_on=on, **flags))
        tower = learner.network.model.vision_backbone.featurizer
        before = tower.pos_embed.clone(), tower.blocks[0].norm1.weight.clone()
        learner.optimizer.update(torch.zeros(()), None, 0.5)
        torch.testing.assert_close(tower.pos_embed, 0.9 * before[0])
        torch.testing.assert_close(tower.blocks[0].norm1.weight, expected * before[1])


def test_betas_decide_the_moments() -> None:
    """After one step exp_avg is (1 - beta1) g and exp_avg_sq (1 - beta2) g^2."""
    learner = tiny_learner(StepConfig(adam_beta1=0.8, adam_beta2=0.95))
    take_step(learner, ragged_batch(2))
    moments, gradient = learner.optimizer.moments(), learner.optimizer.gradient
    torch.testing.assert_close(moments["exp_avg"], 0.2 * gradient)
    torch.testing.assert_close(moments["exp_avg_sq"], 0.05 * gradient.square(), rtol=1e-4, atol=1e-12)


def test_schedules_warm_up_and_fall() -> None:
    base = {"learning_rate": 1.0, "warmup_steps": 4, "max_steps": 14}
    rates = {
        s: [learning_rate(StepConfig(lr_schedule=s, **base), i) for i in range(15)]
        for s in ("constant", "linear", "cosine")
    }
    for schedule in rates.values():
        assert schedule[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates["constant"][5:] == [1.0] * 10
    assert rates["linear"][9] == pytest.approx(0.5) and rates["linear"][14] == 0
    assert rates["cosine"][9] == pytest.approx(0.5) and rates["cosine"][14] == pytest.approx(0)
    assert rates["cosine"][6] > rates["linear"][6]


# --- the opponent


def test_a_frozen_opponent_stays_and_the_base_stays() -> None:
    learner, inputs = tiny_learner(SPIN, opponent=tiny_lora(1)), to_inputs(ragged_batch(2), "cpu")
    before = {n: p.clone() for n, p in learner.network.model.named_parameters()}
    said = learner.reference.answer(inputs, torch.zeros(2, ACTION_DIM))
    trained(learner, 2)
    assert all(torch.equal(p, before[n]) for n, p in learner.network.model.named_parameters())
    assert torch.equal(learner.reference.answer(inputs, torch.zeros(2, ACTION_DIM)).real_logps, said.real_logps)
    assert not torch.equal(
        tiny_learner(SPIN).reference.answer(inputs, torch.zeros(2, ACTION_DIM)).real_logps, said.real_logps
    )


def test_what_was_trained_is_what_is_written() -> None:
    """Maps that are joined are written apart; those that never run keep what they were read with."""
    learner, start = tiny_learner(SPIN), tiny_lora()
    assert same_factors(learner.policy.to_file(), start)
    trained(learner, 1)
    now = learner.policy.to_file().factors
    layer, pairs = "language_model.model.layers.0.self_attn", learner.policy.pairs
    a, b = ([now[f"{layer}.{name}_proj"][which] for name in "qkv"] for which in (0, 1))
    assert torch.equal(torch.cat(a), pairs[f"{layer}.qkv_proj"].a)
    assert torch.equal(torch.cat(b), pairs[f"{layer}.qkv_proj"].b)
    patch = "vision_backbone.featurizer.patch_embed.proj"
    assert now[patch][0].shape == (4, 3, 14, 14) and torch.equal(now[patch][0].flatten(1), pairs[patch].a)
    parts = (".attn_pool.", ".featurizer.blocks.3.", ".fused_featurizer.blocks.2.")
    unused = {n for n in now if any(part in n for part in parts)}
    assert {n for n in now if torch.equal(now[n][1], start.factors[n][1])} == unused


def same_factors(one: LoraFile, other: LoraFile) -> bool:
    pairs = [(one.factors[name], other.factors[name]) for name in one.factors.keys() | other.factors.keys()]
    return all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def test_an_averaged_opponent_follows_the_policy() -> None:
    """Worked by hand: after each step opponent = 0.75 opponent + 0.25 policy, on A and B each."""
    learner = tiny_learner(StepConfig(beta=0.5, opponent_update="ema", ema_decay=0.75))
    expected = learner.policy.master.clone()
    assert torch.equal(learner.average.master, expected)
    for i in range(2):
        expected = 0.75 * expected + 0.25 * trained(learner, 1, start=i)
        torch.testing.assert_close(learner.average.master, expected)
    assert not torch.equal(learner.average.master, learner.policy.master)


def test_kept_answers_spare_the_opponent_and_change_nothing(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "answers.bin", num_samples=1000, key="")
    kept, fresh = tiny_learner(SPIN, answers=store), tiny_learner(SPIN)
    batches = [ragged_batch(2, seed=seed) for seed in (1, 2)]
    for batch in batches:
        take_step(kept, batch), take_step(fresh, batch)
    kept.reference.answer = lambda *_: pytest.fail("asked")  # from here on it must not be asked
    for batch in batches:
        mixed = take(join(batch), slice(None, None, -1))  # another order
        ours, theirs = take_step(kept, mixed), take_step(fresh, mixed)
        assert ours["opponent_generated_logps"] == pytest.approx(theirs["opponent_generated_logps"], abs=1e-4)
    torch.testing.assert_close(kept.policy.master, fresh.policy.master, atol=1e-5, rtol=0)


def test_answers_of_an_opponent_that_moves_are_not_kept(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "answers.bin", num_samples=10, key="")
    with pytest.raises(UserError, match="frozen opponent"):
        tiny_learner(StepConfig(opponent_update="ema"), answers=store)


# --- exactness


def test_two_micro_batches_equal_one_of_twice_the_size() -> None:
    batch, small_steps = ragged_batch(4, even=True), replace(SPIN, learning_rate=1e-4)  # as in `ddp_learner`
    one, two = (tiny_learner(small_steps) for _ in range(2))
    for _ in range(2):
        whole, halves = take_step(one, batch), take_step(two, take(batch, slice(0, 2)), take(batch, slice(2, 4)))
    torch.testing.assert_close(one.policy.master, two.policy.master, atol=1e-5, rtol=0)
    for name in ("total_loss", "grad_norm", "action_logit_max", "policy_real_logps"):
        assert whole[name] == pytest.approx(halves[name], rel=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        StepConfig(beta=0.5, opponent_update="ema", ema_decay=0.9, lr_schedule="cosine", max_steps=6),
        StepConfig(beta=0.5, opponent_temperature=1.0, lora_dropout=0.3, max_grad_norm=0.1, warmup_steps=3),
        StepConfig(
            objective="sft", use_lora=False, learning_rate=1e-3, weight_decay_on="matrices", loss_columns="action"
        ),
    ],
    ids=["ema", "sampled, with dropout", "every weight"],
)
def test_a_resumed_run_is_bit_equal(config: StepConfig) -> None:
    def learner() -> Learner:
        return tiny_learner(config)

    straight = learner()
    torch.manual_seed(0)
    expected = trained(straight, 4)
    first, second = learner(), learner()
    trained(first, 2)
    second.load_state_dict(first.state_dict())
    torch.manual_seed(1)  # nothing may depend on the global generator
    assert torch.equal(trained(second, 2, start=2), expected)
    assert second.steps == 4
    if second.average is not None:
        assert torch.equal(second.average.master, straight.average.master)


def test_a_state_of_another_rank_is_refused() -> None:
    state = tiny_learner(SPIN, rank=2).state_dict()
    with pytest.raises(CheckpointError, match="lora_rank"):
        tiny_learner(SPIN, rank=4).load_state_dict(state)


def test_the_action_columns_alone_give_the_numbers_of_all() -> None:
    """The other rows of a preset's head are zeros: the same log-probs, over seven positions rather than eight."""
    batch, flags = ragged_batch(3), {"objective": "sft", "use_lora": False, "learning_rate": 1e-3}
    whole, narrow = (Learner(tiny_core(), StepConfig(loss_columns=c, **flags)) for c in ("all", "action"))
    inputs = to_inputs(batch, "cpu")
    with torch.no_grad():
        logits = whole.family.score(inputs)[:, :ACTION_DIM]
        assert torch.equal(logits[..., 31_744:32_000], narrow.family.score(inputs)[:, :ACTION_DIM])
    expected = -token_logps(logits, inputs.real).mean().item()
    wide, metrics = take_step(whole, batch), take_step(narrow, batch)
    assert metrics["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["l1_loss"] == pytest.approx(wide["l1_loss"], rel=1e-5)
    head = narrow.network.model.language_model.lm_head.weight
    assert not head[:31_744].any() and not head[32_000:].any() and head[31_744:32_000].any()


def test_the_action_columns_are_not_enough_for_a_head_that_has_learnt_other_words() -> None:
    core = tiny_core()
    core.language_model.lm_head.weight[5, 0] = 0.1
    with pytest.raises(UserError, match="loss_columns"):
        Learner(core, StepConfig(objective="sft", use_lora=False, loss_columns="action"))


def eight_colours() -> Batch:
    """Red, green and blue, each dark or bright, say what the first three numbers of the action are."""
    drawn = np.array(list(itertools.product((0, 1), repeat=3)))
    images = np.broadcast_to(np.array([30, 230], np.uint8)[drawn][:, None, None, None], (8, 1, 224, 224, 3))
    actions = np.zeros((8, 1, ACTION_DIM), np.float32)
    actions[:, 0, :3] = drawn - 0.5
    ids = np.concatenate((np.tile([1, 512, 29_901, 29_871], (8, 1)), encode(actions[:, 0]), np.full((8, 1), 2)), 1)
    return Batch(images=images, input_ids=ids, lengths=np.full(8, 12), actions=actions, samples=np.arange(8))


def test_tiny_learns_from_nothing_to_look() -> None:
    """Whoever knows the actions but does not look loses their entropy: 3 log 2 an action, a seventh of it a token.

    At the start all 256 actions are alike, and other words are out.
    """
    flags = {"learning_rate": 3e-3, "adam_beta2": 0.95, "max_grad_norm": 1.0, "warmup_steps": 5}
    learner = Learner(tiny_core(), StepConfig(objective="sft", use_lora=False, loss_columns="action", **flags))
    losses = [take_step(learner, eight_colours())["train_loss"] for _ in range(36)]
    assert losses[0] == pytest.approx(math.log(256), abs=0.5)
    assert np.mean(losses[-4:]) < 0.8 * 3 * math.log(2) / ACTION_DIM


def test_every_weight_can_be_trained_and_is_saved_by_the_model() -> None:
    model = tiny_core()
    names = ("language_model.model.layers.0.self_attn.k_proj.weight", "language_model.model.embed_tokens.weight")
    names += ("vision_backbone.featurizer.cls_token", "vision_backbone.featurizer.patch_embed.proj.weight")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    learner = Learner(model, StepConfig(objective="sft", use_lora=False, learning_rate=1e-2, weight_decay=0.0))
    losses = [take_step(learner, ragged_batch(2))["train_loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert not any(torch.equal(after[n], before[n]) for n in names)
    unused = "vision_backbone.fused_featurizer.attn_pool.q.weight"
    assert torch.equal(after[unused], before[unused])
    assert learner.evaluate(ragged_batch(2))["train_loss"] == pytest.approx(
        Learner(model, learner.config).evaluate(ragged_batch(2))["train_loss"], abs=1e-5
    )


def test_evaluation_changes_nothing_and_equals_the_steps_own_numbers() -> None:
    learner, batch = tiny_learner(SPIN), ragged_batch(3)
    before = learner.policy.master.clone()
    seen = learner.evaluate(batch)
    assert torch.equal(learner.policy.master, before) and learner.steps == 0
    metrics = take_step(learner, batch)
    assert {n: pytest.approx(metrics[n], abs=1e-5) for n in seen} == seen


# --- several workers


def work(rank: int, folder: Path) -> None:
    """One of two processes: half of each batch, with and without pairs left out of the mean."""
    torch.set_num_threads(1)
    batches = [take(ddp_batch(seed), slice(2 * rank, 2 * rank + 2)) for seed in range(2)]
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", meet, timedelta(minutes=2), world_size=2, rank=rank)
    try:
        results = {}
        for drop in (False, True):
            learner = ddp_learner(drop)
            metrics = [take_step(learner, batch) for batch in batches][-1]
            results[drop] = learner.policy.master, metrics
    finally:
        torch.distributed.destroy_process_group()
    torch.save(results, folder / f"{rank}.pt")


def ddp_learner(drop: bool) -> Learner:
    """A small rate: where a gradient is all but zero, AdamW turns its rounding into a step of any part of the rate."""
    config = StepConfig(beta=0.5, sft_weight=0.1, drop_collisions=drop, learning_rate=1e-4)
    return tiny_learner(config)


@cache
def ddp_batch(seed: int) -> Batch:
    """Of the first four samples one collides, so that the two workers have different numbers of pairs that count."""
    batch = ragged_batch(4, seed=seed, even=True)
    collided = collided_batch(ddp_learner(False), 4) if seed == 0 else batch
    return join(take(collided, slice(0, 1)), take(batch, slice(1, 4)))


def test_two_workers_give_the_adapter_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    other = multiprocessing.get_context("spawn").Process(target=work, args=(1, tmp_path), daemon=True)
    other.start()
    work(0, tmp_path)
    other.join()
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for drop in (False, True):
        (first, seen), (second, also_seen) = ours[drop], theirs[drop]
        assert torch.equal(first, second)
        alone = ddp_learner(drop)
        collisions = []
        for seed in range(2):
            metrics = take_step(alone, ddp_batch(seed))
            collisions.append(metrics["collision_rate"])
        assert collisions[0] == 0.25
        torch.testing.assert_close(first, alone.policy.master, atol=1e-5, rtol=0)
        for name in ("total_loss", "grad_norm", "collision_rate", "action_logit_max", "action_logit_min", "margin"):
            assert seen[name] == also_seen[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6)
