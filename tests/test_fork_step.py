"""One update equals the original self-play fork's: log-probs, loss, gradient, and the losses after a step of AdamW."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from selfplay_parts import golden_core, golden_inputs, ragged_batch, take_step

from spvla.config import StepConfig
from spvla.model.lora_file import LoraFile, fresh_lora
from spvla.train import reference
from spvla.train.flat import FlatLora
from spvla.train.scoring import Inputs, ReferenceOutput, score_real
from spvla.train.step import Learner, Shares
from spvla.types import ACTION_DIM

pytestmark = pytest.mark.usefixtures("one_thread")

FORK = StepConfig(objective="spvla", beta=0.5, eta=0.01, sft_weight=1.0, logp_reduction="mean")


@pytest.fixture
def inputs(golden: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    """The fork's batch, which every batch becomes here: it starts from pixel values, whose images are not on file."""
    inputs = golden_inputs(np.load(golden / "model" / "golden.npz"))
    monkeypatch.setattr(reference, "to_inputs", lambda batch, device, width: inputs)
    return inputs


def golden_numbers(golden: Path, name: str) -> dict[str, np.ndarray]:
    """The fork's own, of one of its steps."""
    return {k.removeprefix(f"head/{name}/"): v for k, v in np.load(golden / "selfplay.npz").items()}


def golden_learner(golden: Path, loss_type: str, *, against_itself: bool = False) -> Learner:
    """The fork's adapter, against the base or its own copy."""
    model, values = golden_core(golden), load_file(golden / "selfplay_lora_r4.safetensors")
    fresh, factors = fresh_lora(model, rank=4), {}
    for name in fresh.factors:
        keys = [f"base_model.model.{name}.lora_{part}.default.weight" for part in "AB"]
        factors[name] = values[keys[0]], values[keys[1]]
    adapter = LoraFile(rank=4, alpha=fresh.alpha, factors=factors)
    config = StepConfig(**{**vars(FORK), "loss_type": loss_type})
    return Learner(model, config, policy=adapter, opponent=adapter if against_itself else None)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_a_step_equals_the_forks_against_the_base(golden: Path, inputs: Inputs, loss_type: str) -> None:
    expected, batch = golden_numbers(golden, f"{loss_type}/seed0base"), ragged_batch(4)
    learner = golden_learner(golden, loss_type)
    answer = learner.reference.answer(inputs, torch.zeros(4, ACTION_DIM))
    loss, measured = learner._loss(inputs, answer, Shares(1 / 4, 1 / 4))
    loss.backward()
    check_gradient(learner, expected)
    for short, name in (("pr", "policy_real"), ("pg", "policy_generated"), ("o_r", "opponent_real")):
        assert measured.sums[f"{name}_logps"].item() == pytest.approx(expected[short].mean(), abs=1e-5)
    first, second = take_step(learner, batch), take_step(learner, batch)
    assert first["grad_norm"] == pytest.approx(expected["lora_grad_norm"], rel=1e-5)
    for metrics, prefix in ((first, ""), (second, "after1/")):
        assert metrics["selfplay_loss"] == pytest.approx(expected[f"{prefix}loss"], abs=1e-5)
        assert metrics["train_loss"] == pytest.approx(expected[f"{prefix}sft"], abs=1e-5)
        assert metrics["total_loss"] == pytest.approx(expected[f"{prefix}total"], abs=1e-5)


def check_gradient(learner: Learner, expected: dict[str, np.ndarray]) -> None:
    lora = learner.policy.pairs["projector.fc2"]
    for leaf, part in ((lora.a, "lora_A"), (lora.b, "lora_B")):
        name = f"grad/base_model.model.projector.fc2.{part}.default.weight"
        np.testing.assert_allclose(leaf.grad, expected[name], atol=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_a_step_equals_the_forks_against_its_own_copy(golden: Path, inputs: Inputs, loss_type: str) -> None:
    """The fork's copied opponent goes on running the *policy's* vision towers, gradient and all (its towers' forward is
    bound to the original). Ours is frozen as a whole; with the towers tied for this test its numbers come out."""
    expected, batch = golden_numbers(golden, f"{loss_type}/same"), ragged_batch(4)
    learner = golden_learner(golden, loss_type, against_itself=True)

    def tied(inputs: Inputs, uniforms: object) -> ReferenceOutput:
        with frozen.attached():
            logits = score_real(learner.network, inputs)[:, :ACTION_DIM]
        return ReferenceOutput(
            generated=logits.detach().argmax(-1),
            real_logps=learner.objective.sampler.logps(logits, inputs.real),
            generated_logps=learner.objective.sampler.greedy(logits),
        )

    first = take_step(learner, batch)  # equal weights: equal log-probs, whoever's towers ran
    assert first["selfplay_loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert first["real_rewards"] == first["generated_rewards"] == 0
    learner = golden_learner(golden, loss_type, against_itself=True)
    frozen = FlatLora(learner.network.model, learner.policy.file, trainable=False)
    frozen.pairs |= {path: pair for path, pair in learner.policy.pairs.items() if path.startswith("vision")}
    learner.reference.answer = tied
    first, second = take_step(learner, batch), take_step(learner, batch)
    assert first["grad_norm"] == pytest.approx(expected["lora_grad_norm"], rel=1e-5)
    assert second["total_loss"] == pytest.approx(expected["after1/total"], abs=1e-5)
    assert second["selfplay_loss"] == pytest.approx(expected["after1/loss"], abs=1e-5)
