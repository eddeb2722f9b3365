"""Training in chunks: the passes' numbers, a run from random weights to a policy that acts, self-play, resumption."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_parts import episode, store_of
from oft_parts import chunk_batch, create_oft, enlarge, observations, reference_oft_model
from policy_parts import random_lora
from selfplay_parts import take_step
from training_parts import quick_flags

from spvla.config import StepConfig, TrainConfig
from spvla.errors import UserError
from spvla.model.kernels.compiled import training_kernels
from spvla.model.llama import EAGER
from spvla.model.lora_file import read_lora_config
from spvla.policies.checkpoint import resolve, save_merged
from spvla.policies.networks import load_network
from spvla.policies.oft.form import OftForm
from spvla.policies.oft.network import OpenVLAOFT
from spvla.policies.registry import PolicyFlags, load_policy
from spvla.train.chunks import Chunks, to_chunk_inputs
from spvla.train.family import family_of
from spvla.train.network import Network
from spvla.train.prepare import Job, require_startable, start_policy
from spvla.train.scoring import TokenSampler, to_inputs
from spvla.train.session import Place, Session
from spvla.train.step import Learner
from spvla.types import Batch

GREEDY = TokenSampler()


def small_model(form: OftForm) -> OpenVLAOFT:
    return reference_oft_model(form).requires_grad_(False)


@pytest.fixture(scope="module")
def chunks() -> Chunks:
    family = family_of(Network(model=small_model(OftForm(cameras=2, proprio=True))))
    assert isinstance(family, Chunks)
    return family


def test_training_passes_give_the_numbers_of_acting(chunks: Chunks) -> None:
    inputs = to_inputs(chunk_batch(3), "cpu")
    seen = to_chunk_inputs(inputs)._replace(pixels=inputs.pixels.unflatten(0, (3, 2)))
    with torch.no_grad():
        expected = chunks.model.logits(chunks.model.predict(seen))
        found = chunks.score(inputs)
    assert torch.allclose(found, expected, atol=1e-4)


def test_compiled_halves_of_layers_pass_a_chunk_as_plain_ones() -> None:
    """Traced whole, without and with gradient; the compiler behind it is left out."""
    model, inputs = small_model(OftForm(cameras=2, proprio=True)), to_inputs(chunk_batch(2), "cpu")
    found = []
    for kernels in (EAGER, training_kernels("eager")):
        family = family_of(Network(model=model.requires_grad_(), kernels=kernels))
        logits = family.score(inputs)
        (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), model.proprio_projector.fc1.weight)
        found.append((logits.detach(), gradient))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-4 * found[0][1].abs().max().item())


def test_the_originals_loss_comes_out_of_a_step(golden: Path) -> None:
    data = np.load(golden / "oft/train.npz")
    frames = np.stack([[enlarge(data[f"image{i}"])] for i in range(3)])
    lengths = data["attention_mask"].sum(1)
    batch = Batch(
        images=frames, input_ids=data["input_ids"], lengths=lengths, actions=data["actions"], samples=np.arange(3)
    )
    learner = Learner(small_model(OftForm()), StepConfig(objective="sft", use_lora=False))
    metrics = learner.evaluate(batch)
    assert metrics["train_loss"] == pytest.approx(float(data["ce_loss"]), rel=1e-4)
    for name in ("curr_action_accuracy", "next_actions_accuracy", "curr_action_l1_loss", "next_actions_l1_loss"):
        assert metrics[name] == pytest.approx(float(data[f"ce_metric_{name}"]), rel=1e-4, abs=1e-6)
    assert metrics["l1_loss"] == pytest.approx(
        (metrics["curr_action_l1_loss"] + 7 * metrics["next_actions_l1_loss"]) / 8
    )


def test_the_originals_regression_loss_comes_out_of_a_step(golden: Path) -> None:
    data = np.load(golden / "oft/train.npz")
    frames = np.stack([[enlarge(data[f"{name}{i}"]) for name in ("image", "wrist")] for i in range(3)])
    held = {"input_ids": data["input_ids"], "lengths": data["attention_mask"].sum(1), "proprio": data["proprio"]}
    batch = Batch(images=frames, actions=data["actions"], samples=np.arange(3), **held)
    model = small_model(OftForm(cameras=2, proprio=True, head="l1"))
    learner = Learner(model, StepConfig(objective="sft", use_lora=False))
    metrics = learner.evaluate(batch)
    assert metrics["train_loss"] == metrics["l1_loss"] == pytest.approx(float(data["l1_loss"]), rel=1e-4)
    for name in ("curr_action_l1_loss", "next_actions_l1_loss"):  # the original rounds its targets to bfloat16
        assert metrics[name] == pytest.approx(float(data[f"l1_metric_{name}"]), rel=2e-3)
    before = model.action_head.model.fc2.weight.clone()
    losses = [take_step(learner, batch)["train_loss"] for _ in range(3)]
    assert losses[-1] < losses[0] and not torch.equal(before, model.action_head.model.fc2.weight)


def test_a_pair_costs_one_pass_because_no_token_enters_it(chunks: Chunks) -> None:
    first, second = (to_inputs(chunk_batch(2, answer=answer), "cpu") for answer in (31_800, 31_900))
    with torch.no_grad():
        assert torch.equal(chunks.score(first), chunks.score(second))
        pair = chunks.score_pair(first, second.real)
        assert torch.equal(pair.generated, pair.real[:, :56])
        swapped = GREEDY.logps(pair.generated, second.real)
        assert torch.equal(swapped, GREEDY.logps(chunks.score(second)[:, :56], second.real))


def test_an_opponent_draws_each_token_by_itself(chunks: Chunks) -> None:
    inputs, uniforms = to_inputs(chunk_batch(2), "cpu"), torch.rand(2, 56, generator=torch.Generator().manual_seed(0))
    greedy = chunks.propose(inputs, GREEDY, uniforms)
    drawn = chunks.propose(inputs, TokenSampler(temperature=1.0), uniforms)
    with torch.no_grad():
        logits = chunks.score(inputs)[:, :56].float()
    assert torch.equal(greedy.generated, logits.argmax(-1))
    below = (logits.softmax(-1).cumsum(-1) < uniforms[..., None]).sum(-1)  # inverts the distribution of each slot
    assert (drawn.generated - below).abs().max() <= 1 and not torch.equal(drawn.generated, greedy.generated)
    assert torch.allclose(drawn.generated_logps, GREEDY.logps(logits, drawn.generated), atol=1e-5)


def test_steps_lower_the_loss_and_train_the_projector() -> None:
    model = small_model(OftForm(cameras=2, proprio=True))
    before = model.proprio_projector.fc1.weight.clone()
    learner = Learner(model, StepConfig(objective="sft", use_lora=False, learning_rate=3e-3))
    losses = [take_step(learner, chunk_batch(2))["train_loss"] for _ in range(3)]
    assert losses[-1] < losses[0] - 1
    assert not torch.equal(model.proprio_projector.fc1.weight, before)


@pytest.mark.parametrize("against", ["the bare base", "an adapter"])
def test_self_play_trains_adapter_and_projector_against_an_opponent_that_stays(against: str) -> None:
    """The opponent's projector is the one that the policy began with, not the one that is trained."""
    model = small_model(OftForm(cameras=2, proprio=True))
    policy, opponent = (random_lora(model, rank=4, seed=seed, strength=0.05) for seed in (0, 1))
    config = StepConfig(objective="spin", learning_rate=1e-2, opponent_temperature=1.0)
    learner = Learner(model, config, policy=policy, opponent=opponent if against == "an adapter" else None)
    before, batch = model.proprio_projector.fc1.weight.clone(), chunk_batch(2)
    steps = [take_step(learner, batch) for _ in range(3)]
    assert not torch.equal(model.proprio_projector.fc1.weight, before)
    assert len({step["opponent_real_logps"] for step in steps}) == 1
    assert steps[2]["selfplay_loss"] < steps[0]["selfplay_loss"]
    assert steps[2]["policy_real_logps"] > steps[0]["policy_real_logps"]


def test_an_adapter_is_written_with_its_projector_and_acts_and_goes_on(tmp_path: Path, one_thread: None) -> None:
    flags = {"vla_path": str(create_oft(tmp_path / "base", OftForm(cameras=2, proprio=True))), "objective": "spin"}
    job = job_of(quick_flags(tmp_path, tmp_path, **flags), tmp_path)
    session = Session(job, Place())
    session.advance()
    session.write(tmp_path / "adapter")
    assert "spvla" not in read_lora_config(tmp_path / "adapter")  # an entry that peft does not know
    policy = load_policy(tmp_path / "adapter")
    assert policy.act(observations(2), unnorm_key="toy_no_noops").shape == (2, 8, 7)
    state = torch.load(tmp_path / "adapter/proprio_projector--latest_checkpoint.pt", weights_only=True)
    trained = session.model.proprio_projector.fc1.weight
    assert torch.equal(state["module.fc1.weight"], trained)
    job = job_of(quick_flags(tmp_path, tmp_path, **flags | {"vla_path": str(tmp_path / "adapter")}), tmp_path)
    after = Session(job, Place())
    assert torch.equal(after.model.proprio_projector.fc1.weight, trained)
    save_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = load_policy(tmp_path / "merged").decode(observations(2), unnorm_key="toy_no_noops")
    assert np.mean(merged != policy.decode(observations(2), unnorm_key="toy_no_noops")) < 0.05  # sums round otherwise


def test_a_plain_policy_becomes_one_of_chunks_where_flags_ask_for_it(tmp_path: Path) -> None:
    flags = PolicyFlags(use_l1_regression=True, num_images_in_input=2, use_proprio=True)
    model = load_network(resolve("tiny"), flags=flags)
    assert model.form == OftForm(cameras=2, proprio=True, head="l1")
    assert model.added().keys() == {"action_head", "proprio_projector"}


def test_self_play_of_a_regressing_head_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = quick_flags(tmp_path, tmp_path, vla_path=str(resolve("tiny")), use_l1_regression=True)
    with pytest.raises(UserError, match="--objective spin for a policy that regresses"):
        require_startable(config)


def job_of(config: TrainConfig, root: Path) -> Job:
    run = root / "run"
    run.mkdir(exist_ok=True)
    store = root / "toy_no_noops"
    if not store.exists():
        store_of(root, [episode(i, steps=10) for i in range(4)], "toy_no_noops")
    start = start_policy(config, run)
    stores = (("toy_no_noops", store / "index", 1.0),)
    return Job(config=config, run=run, start=start, start_digest="0", stores=stores, use_gpu=False)


def test_a_run_from_random_weights_ends_in_a_policy_that_acts(tmp_path: Path, one_thread: None) -> None:
    """Four steps straight, and two, a checkpoint, two, give the same bytes."""
    flags = {"vla_path": "tiny-oft", "objective": "sft", "use_lora": False, "loss_columns": "action"}
    job = job_of(quick_flags(tmp_path, tmp_path, **flags), tmp_path)
    straight = Session(job, Place())
    for step in range(4):
        if step == 2:
            straight.write(tmp_path / "half")
        straight.advance()
    straight.write(tmp_path / "straight")
    again = Session(job, Place())
    again.load(tmp_path / "half")
    for _ in range(2):
        again.advance()
    again.write(tmp_path / "again")
    for name in ("model.safetensors", "proprio_projector--latest_checkpoint.pt"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    policy = load_policy(tmp_path / "straight")
    assert policy.needs.cameras == ("agentview", "robot0_eye_in_hand") and policy.needs.proprio
    assert policy.act(observations(2), unnorm_key="toy_no_noops").shape == (2, 8, 7)
