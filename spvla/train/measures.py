"""What one micro-batch contributes: losses and metrics of each sample, all (B,), before any averaging.

Names are the original fork's where it had them: train_loss (cross entropy over the seven actions and the end),
action_accuracy and l1_loss (teacher-forced), normalized_loss, selfplay_loss, and the four log-probs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spvla.train.objective import LossType, Reduction, cap_logits, reduce_tokens, spin_loss, token_logps
from spvla.train.scoring import Inputs, Reply
from spvla.types import ACTION_DIM

Measures = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Margin:
    """The part of the flags that makes a self-play loss out of log-probs."""

    beta: float
    eta: float
    loss_type: LossType
    reduction: Reduction


def imitation(logits: Tensor, inputs: Inputs, centers: Tensor, softcap: float | None) -> Measures:
    """Behaviour cloning's measures from (B, A + 1, V). `centers` (V,) is the action that each id stands for."""
    guesses = logits[:, :ACTION_DIM].detach().argmax(-1)
    miss = centers[guesses] - centers[inputs.real]
    return {
        "train_loss": -token_logps(cap_logits(logits.float(), softcap), inputs.targets).mean(-1),
        "action_accuracy": (guesses == inputs.real).float().mean(-1),
        "l1_loss": miss.abs().mean(-1),
    }


def selfplay(real_logps: Tensor, generated_logps: Tensor, reply: Reply, margin: Margin) -> Measures:
    """Self-play's measures from the policy's log-probs of each token, (B, A) twice."""
    names = ("policy_real_logps", "policy_generated_logps", "opponent_real_logps", "opponent_generated_logps")
    tokens = (real_logps, generated_logps, reply.real_logps, reply.generated_logps)
    logps = {name: reduce_tokens(t, margin.reduction) for name, t in zip(names, tokens, strict=True)}
    pair = spin_loss(*logps.values(), beta=margin.beta, eta=margin.eta, loss_type=margin.loss_type)
    return {
        "selfplay_loss": pair.loss,
        **{name: value.detach() for name, value in logps.items()},
        "normalized_loss": -real_logps.detach().mean(-1),
        "real_rewards": pair.real_rewards,
        "generated_rewards": pair.generated_rewards,
        "margin": pair.real_rewards - pair.generated_rewards,
    }


def collided(inputs: Inputs, reply: Reply) -> Tensor:
    """(B,) bool: the opponent's action is the real one, so the pair carries no signal."""
    return (reply.generated == inputs.real).all(-1)


def extremes(logits: Tensor) -> Tensor:
    """(2,) largest logit, and smallest negated, so that both are maxima."""
    low, high = torch.aminmax(logits.detach().float())
    return torch.stack((high, -low))
