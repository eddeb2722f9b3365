"""What one micro-batch contributes: losses and metrics of each sample, all (B,), before any averaging.

Names are the original fork's where it had them: train_loss (cross entropy over the seven actions and the end),
action_accuracy and l1_loss (teacher-forced), normalized_loss, selfplay_loss, and the four log-probs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spvla.policies.openvla import actions
from spvla.train.objective import LossType, Reduction, cap_logits, reduce_tokens, spin_loss, token_logps
from spvla.train.scoring import Inputs, ReferenceOutput

Measures = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Margin:
    """The part of the flags that makes a self-play loss out of log-probs."""

    beta: float
    eta: float
    loss_type: LossType
    reduction: Reduction


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of the logits that are computed: all of the vocabulary, or those of actions.

    The others are then known to be zeros, and the end of sequence, which is among them, has no loss.
    """

    start: int
    zeros: int  # columns that are not computed
    centers: Tensor  # (columns,) the action that each stands for

    @classmethod
    def of(cls, vocabulary: int, chosen: slice, device: torch.device) -> "Columns":
        start, end, _ = chosen.indices(vocabulary)
        centers = torch.from_numpy(actions.decode(np.arange(start, end))).float().to(device)
        return cls(start=start, zeros=vocabulary - (end - start), centers=centers)


def imitation(logits: Tensor, inputs: Inputs, columns: Columns, softcap: float | None) -> Measures:
    """Behaviour cloning's measures from logits (B, R, columns); action tokens come first."""
    real = inputs.real - columns.start
    targets = real if columns.zeros else inputs.targets
    logits = logits[:, : targets.shape[1]]
    guesses = logits[:, : real.shape[1]].detach().argmax(-1)
    miss = columns.centers[guesses] - columns.centers[real]
    return {
        "train_loss": -token_logps(cap_logits(logits.float(), softcap), targets, zeros=columns.zeros).mean(-1),
        "action_accuracy": (guesses == real).float().mean(-1),
        "l1_loss": miss.abs().mean(-1),
    }


def selfplay(real_logps: Tensor, generated_logps: Tensor, reply: ReferenceOutput, margin: Margin) -> Measures:
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


def collided(inputs: Inputs, reply: ReferenceOutput) -> Tensor:
    """(B,) bool: the opponent's action is the real one, so the pair carries no signal."""
    return (reply.generated == inputs.real).all(-1)


def extremes(logits: Tensor) -> Tensor:
    """(2,) largest logit, and smallest negated, so that both are maxima."""
    low, high = torch.aminmax(logits.detach().float())
    return torch.stack((high, -low))
