"""Losses against numbers worked by hand, and against log-probs that the original fork printed."""

import json
import math
from pathlib import Path

import pytest
import torch

from spvla.train.losses import cap_logits, greedy_logps, reduce_tokens, spin_loss, token_logps


def tensors(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([v]) for v in values]


def test_a_pair_worked_by_hand() -> None:
    """x = (-1 + 3) - (-2 + 1) = 3, ent = -3 + 2 = -1, argument 0.5 * 3 - 0.1 * -1 = 1.6."""
    out = spin_loss(*tensors(-1, -2, -3, -1), beta=0.5, eta=0.1)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-1.6)), rel=1e-6)
    assert out.real_rewards.item() == pytest.approx(1.0)
    assert out.generated_rewards.item() == pytest.approx(-0.5)


def test_a_hinge_worked_by_hand() -> None:
    """1 - 0.5 x - 0.1 ent: x = 1 gives 1 - 0.5 + 0.1 = 0.6; x = 3 is past the margin."""
    near = spin_loss(*tensors(-1, -2, -2, -2), beta=0.5, eta=0.1, loss_type="hinge")  # ent = 0
    assert near.loss.item() == pytest.approx(0.5)
    entropy = spin_loss(*tensors(-1, -2, -3, -3), beta=0.5, eta=0.1, loss_type="hinge")  # x = 1, ent = -1
    assert entropy.loss.item() == pytest.approx(0.6)
    assert spin_loss(*tensors(-1, -5, -3, -3), beta=0.5, loss_type="hinge").loss.item() == 0


def test_equal_models_lose_log_two_whatever_beta() -> None:
    for beta in (0.1, 0.7, 5.0):
        assert spin_loss(*tensors(-4, -2, -4, -2), beta=beta).loss.item() == pytest.approx(math.log(2))


def test_the_gradient_pulls_real_up_and_generated_down() -> None:
    """d loss / d policy_real = -beta sigmoid(-beta x); at x = 0 that is -beta / 2, and the opposite for generated."""
    real, generated = (torch.tensor([v], requires_grad=True) for v in (-4.0, -2.0))
    spin_loss(real, generated, *tensors(-4, -2), beta=0.3).loss.backward()
    assert real.grad.item() == pytest.approx(-0.15)
    assert generated.grad.item() == pytest.approx(0.15)


def test_huge_margins_stay_finite() -> None:
    assert spin_loss(*tensors(-1e6, 0, 0, -1e6), beta=1.0).loss.item() == pytest.approx(2e6)
    assert spin_loss(*tensors(0, -1e6, -1e6, 0), beta=1.0).loss.item() == 0


def test_rewards_carry_no_gradient() -> None:
    real = torch.tensor([-1.0], requires_grad=True)
    out = spin_loss(real, *tensors(-2, -3, -1), beta=0.5)
    assert not out.real_rewards.requires_grad and not out.generated_rewards.requires_grad


def test_token_log_probs_of_three_logits() -> None:
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]])  # probabilities 1/8, 2/8, 5/8
    assert token_logps(logits, torch.tensor([1])).item() == pytest.approx(math.log(2 / 8))
    assert greedy_logps(logits).item() == pytest.approx(math.log(5 / 8))
    assert token_logps(logits, torch.tensor([2]), scale=math.log(5)).item() == pytest.approx(
        1 - math.log(1 + 2 ** (1 / math.log(5)) + math.e)
    )


def test_logits_that_are_zero_need_not_be_given() -> None:
    logits, ids = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([2])
    whole = torch.cat((logits, torch.zeros(1, 5)), 1)
    assert token_logps(logits, ids, zeros=5).item() == pytest.approx(token_logps(whole, ids).item(), rel=1e-6)


def test_low_precision_logits_give_float32_log_probs() -> None:
    logits = torch.randn(2, 7, 100, dtype=torch.bfloat16)
    ids = torch.randint(0, 100, (2, 7))
    assert token_logps(logits, ids).dtype == torch.float32
    assert torch.allclose(token_logps(logits, ids), logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0])


def test_a_soft_cap_bounds_logits_and_keeps_their_order() -> None:
    logits = torch.linspace(-40, 40, 81)
    capped = cap_logits(logits, 10.0)
    assert capped.abs().max() <= 10
    assert (capped.diff() >= 0).all()
    assert capped[41].item() == pytest.approx(1.0, rel=0.01)  # near 0 nothing changes
    assert cap_logits(logits, None) is logits


def test_reduction_sums_or_averages() -> None:
    tokens = torch.tensor([[-1.0, -2.0, -3.0]])
    assert reduce_tokens(tokens, "sum").item() == -6
    assert reduce_tokens(tokens, "mean").item() == -2


def test_the_blocks_that_the_fork_printed(golden: Path) -> None:
    """Losses of the log-probs in the fork's notes, for the flags its runs had. There `sgn=-1` is sigmoid's sign."""
    blocks = json.loads((golden / "selfplay_logs.json").read_text())
    for block in blocks.values():
        names = ("policy_real_logps", "policy_generated_logps", "opponent_real_logps", "opponent_generated_logps")
        logps = [torch.tensor(block[n], dtype=torch.float64) for n in names]
        for flags, loss in block["losses"].items():
            beta, eta, sign = (float(part.split("=")[1]) for part in flags.split(","))
            ours = spin_loss(*logps, beta=beta, eta=-sign * eta).loss.mean().item()
            assert ours == pytest.approx(loss, abs=1e-9), flags
        if block["policy_equals_opponent"]:
            assert spin_loss(*logps, beta=0.7).loss.mean().item() == pytest.approx(math.log(2))
