"""The statements of docs/theory.md: the closed form against a tabular softmax policy trained on the loss itself."""

import pytest
import torch
from torch import Tensor

from spvla.train.losses import optimum, spin_loss

DATA = torch.tensor([0.40, 0.25, 0.15, 0.10, 0.07, 0.03], dtype=torch.float64)
OPPONENT = torch.tensor([0.10, 0.15, 0.30, 0.05, 0.25, 0.15], dtype=torch.float64)


def expected_loss(logits: Tensor, data: Tensor, opponent: Tensor, beta: float) -> Tensor:
    """The loss over all pairs y ~ data, y' ~ opponent, each by its probability."""
    policy, opponent_logps = logits.log_softmax(-1), opponent.log()
    pairs = torch.cartesian_prod(torch.arange(len(data)), torch.arange(len(data)))
    real, generated = pairs[:, 0], pairs[:, 1]
    loss = spin_loss(policy[real], policy[generated], opponent_logps[real], opponent_logps[generated], beta=beta).loss
    return (data[real] * opponent[generated] * loss).sum()


def trained(data: Tensor, opponent: Tensor, beta: float) -> Tensor:
    """A softmax over the table of actions, minimised to the end."""
    logits = opponent.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected_loss(logits, data, opponent, beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1)


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * (p - q).abs().sum().item()


@pytest.mark.parametrize("beta", [0.3, 0.7, 1.0])
def test_a_tabular_policy_trains_to_the_closed_form(beta: float) -> None:
    found = trained(DATA, OPPONENT, beta)
    assert total_variation(found, optimum(OPPONENT, DATA, beta)) < 1e-3
    assert total_variation(found, OPPONENT) > 0.1  # it has moved


def test_at_beta_one_a_single_iteration_reaches_the_data() -> None:
    assert total_variation(optimum(OPPONENT, DATA, 1.0), DATA) < 1e-12


def test_two_actions_worked_by_hand() -> None:
    """Opponent 1/2, 1/2; data 4/5, 1/5; beta 2: the square roots of the ratios, 2 : 1."""
    found = optimum(torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2]), 2.0)
    assert found.tolist() == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize("beta", [0.3, 0.7, 1.0])
def test_the_data_is_a_fixed_point(beta: float) -> None:
    assert total_variation(optimum(DATA, DATA, beta), DATA) < 1e-12
    logits = DATA.log().requires_grad_()
    expected_loss(logits, DATA, DATA, beta).backward()
    assert logits.grad.abs().max() < 1e-12


def iterated(beta: float, count: int) -> Tensor:
    policy = OPPONENT
    for _ in range(count):
        policy = optimum(policy, DATA, beta)
    return policy


@pytest.mark.parametrize("beta", [0.7, 1.0, 3.0])
def test_iterations_reach_the_data_when_beta_is_above_a_half(beta: float) -> None:
    assert total_variation(iterated(beta, 40), DATA) < 1e-3


@pytest.mark.parametrize("beta", [0.3, 0.45])
def test_iterations_move_away_from_the_data_when_beta_is_below_a_half(beta: float) -> None:
    distances = [total_variation(iterated(beta, count), DATA) for count in (0, 2, 4, 6)]
    assert distances == sorted(distances) and distances[-1] > distances[0] + 0.2


def test_one_iteration_scales_the_log_ratios_by_one_minus_one_over_beta() -> None:
    before, after = (DATA.log() - p.log() for p in (OPPONENT, optimum(OPPONENT, DATA, 0.7)))
    ratio = (after - after.mean()) / (before - before.mean())
    assert ratio.tolist() == pytest.approx([1 - 1 / 0.7] * len(DATA))


def chunk_gradient(marginals: Tensor, joint: Tensor) -> Tensor:
    """Of the loss over chunks of two tokens, where a policy that is a product plays against itself."""
    logits = marginals.log().requires_grad_()
    policy = logits.log_softmax(-1)
    chunks = policy[0][:, None] + policy[1]  # (V, V) log-probs of each chunk
    opponent = chunks.detach()
    loss = torch.zeros((), dtype=torch.float64)
    for real, generated in torch.cartesian_prod(torch.arange(joint.numel()), torch.arange(joint.numel())):
        pair = [table.flatten()[i] for table in (chunks, opponent) for i in (real, generated)]
        weight = joint.flatten()[real] * opponent.exp().flatten()[generated]
        loss = loss + weight * spin_loss(*pair, beta=0.7).loss
    return torch.autograd.grad(loss, logits)[0]


def test_chunks_come_to_rest_at_the_product_of_the_datas_marginals() -> None:
    joint = torch.tensor([[0.4, 0.1, 0.1], [0.0, 0.1, 0.1], [0.0, 0.0, 0.2]], dtype=torch.float64)  # no product
    marginals = torch.stack((joint.sum(1), joint.sum(0)))
    assert chunk_gradient(marginals, joint).abs().max() < 1e-12
    assert chunk_gradient(marginals.flip(0), joint).abs().max() > 0.01


@pytest.mark.parametrize("width", [0.05, 0.4])
def test_a_regressing_heads_self_play_sets_out_along_l1s_own_gradient(width: float) -> None:
    """Laplace's likelihood around mu, the opponent the same: beta / (2 b) times the gradient of E|y - mu|."""
    data = torch.tensor([-0.9, -0.2, 0.1, 0.3, 0.8], dtype=torch.float64)
    noise = torch.linspace(-8, 8, 2000, dtype=torch.float64) * width  # an even number: none of them is zero
    drawn = (-(noise / width).abs()).softmax(-1)
    for start in (-0.5, 0.1 + 1e-9, 0.6):  # the second as good as the median
        mu = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        y, other = data[:, None], (mu.detach() + noise)[None]
        logps = [-(x - m).abs() / width for m in (mu, mu.detach()) for x in (y, other)]
        loss = (drawn * spin_loss(*logps, beta=0.7).loss).sum(-1).mean()
        (gradient,) = torch.autograd.grad(loss, mu)
        l1 = torch.sign(mu.detach() - data).mean()
        assert gradient.item() == pytest.approx(0.7 / (2 * width) * l1.item(), abs=1e-6)
    assert 0.7 / (2 * width) * abs(torch.sign(0.1 - data).mean().item()) < 1e-12
