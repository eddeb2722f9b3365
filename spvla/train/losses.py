"""Pure losses of self-play: four (B,) log-probs in, a loss and two rewards for each pair out.

Legend: B batch, A action dims (7), V vocabulary. `real` is the demonstrated action y, `generated` the opponent's y'.
`policy` is what is trained; `opponent` is frozen while a pair is scored.

Two forms use the same loss and differ in the generated log-probs they put in:
  spin   one y' drawn from the opponent, scored by both models (arxiv.org/abs/2401.01335, algorithm 1)
  spvla  the original fork's: each model's own teacher-forced argmax, so two different sequences
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossType = Literal["sigmoid", "hinge"]
Reduction = Literal["sum", "mean"]


@dataclass(frozen=True, kw_only=True)
class SpinLoss:
    loss: Tensor  # (B,)
    real_rewards: Tensor  # (B,) beta (policy_real - opponent_real), without gradient
    generated_rewards: Tensor  # (B,) beta (policy_generated - opponent_generated), without gradient


def spin_loss(
    policy_real: Tensor,  # (B,) each: log-prob of a whole action
    policy_generated: Tensor,
    opponent_real: Tensor,
    opponent_generated: Tensor,
    *,
    beta: float,
    eta: float = 0.0,
    loss_type: LossType = "sigmoid",
) -> SpinLoss:
    """SPIN's loss for each pair (arxiv.org/abs/2401.01335, eq. 4.7), with the fork's entropy term.

    With x = (policy_real - opponent_real) - (policy_generated - opponent_generated)
    and  ent = opponent_real - policy_generated:
        sigmoid: -log sigmoid(beta x - eta ent)
        hinge:   relu(1 - beta x - eta ent)       the fork's sign, opposite to sigmoid's
    Since -ent = policy_generated - opponent_real, under sigmoid eta > 0 holds the generated action's probability up,
    against beta, and under hinge it pushes it down further.
    """
    real = policy_real - opponent_real
    generated = policy_generated - opponent_generated
    margin = beta * (real - generated)
    entropy = eta * (opponent_real - policy_generated)
    loss = -F.logsigmoid(margin - entropy) if loss_type == "sigmoid" else F.relu(1 - margin - entropy)
    return SpinLoss(loss=loss, real_rewards=(beta * real).detach(), generated_rewards=(beta * generated).detach())


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Keeps logits within (-softcap, softcap), smoothly: softcap * tanh(logits / softcap). None leaves them."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_logps(logits: Tensor, ids: Tensor, *, scale: float = 1.0, zeros: int = 0) -> Tensor:
    """Log-prob of each token under float32 logits divided by `scale`: (..., V), (...) -> (...).

    `zeros` counts further tokens, whose logits are 0 and are not given.
    """
    logits = logits.float() / scale
    total = logits.logsumexp(-1)
    if zeros:
        total = torch.logaddexp(total, total.new_full((), math.log(zeros)))
    return logits.gather(-1, ids[..., None])[..., 0] - total


def greedy_logps(logits: Tensor, *, scale: float = 1.0) -> Tensor:
    """Log-prob of each position's most likely token: (..., V) -> (...). The fork's generated log-probs."""
    return token_logps(logits, logits.argmax(-1), scale=scale)


def reduce_tokens(logps: Tensor, reduction: Reduction) -> Tensor:
    """Seven token log-probs become one of the action: (B, A) -> (B,). SPIN sums; the fork averaged."""
    return logps.sum(-1) if reduction == "sum" else logps.mean(-1)


def optimum(p_opponent: Tensor, p_data: Tensor, beta: float) -> Tensor:
    """Where the logistic loss leads a policy that can be any distribution: (..., V), (..., V) -> (..., V).

    p_new(y) is proportional to p_opponent(y) (p_data(y) / p_opponent(y))^(1 / beta); docs/theory.md derives it.
    """
    logits = p_opponent.log() + (p_data.log() - p_opponent.log()) / beta
    return logits.softmax(-1)
