"""What one micro-batch contributes: losses and metrics of each sample, all (B,), before any averaging.

Names are the original fork's where it had them: train_loss (cross entropy over the seven actions and the end),
action_accuracy and l1_loss (teacher-forced), normalized_loss, selfplay_loss, and the four log-probs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spvla.policies.openvla.actions import NUM_BINS, decode
from spvla.train.objective import LossType, Reduction, cap_logits, reduce_tokens, spin_loss, token_logps
from spvla.train.scoring import Inputs, ReferenceOutput
from spvla.types import ACTION_DIM

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
        centers = torch.from_numpy(decode(np.arange(start, end))).float().to(device)
        return cls(start=start, zeros=vocabulary - (end - start), centers=centers)


def imitation(logits: Tensor, inputs: Inputs, columns: Columns, softcap: float | None) -> Measures:
    """Behaviour cloning's measures from logits (B, R, columns); action tokens come first."""
    real = inputs.real - columns.start
    targets = real if columns.zeros else inputs.targets
    logits = logits[:, : targets.shape[1]]
    guesses = logits[:, : real.shape[1]].detach().argmax(-1)
    miss = columns.centers[guesses] - columns.centers[real]
    loss = -token_logps(cap_logits(logits.float(), softcap), targets, zeros=columns.zeros).mean(-1)
    return {"train_loss": loss, **accuracies((guesses == real).float(), miss.abs())}


def regression(predicted: Tensor, actions: Tensor) -> Measures:
    """Behaviour cloning's measures of normalised actions (B, K, A), predicted and demonstrated.

    A number counts as right where it falls into the demonstrated one's bin, as a token would.
    """
    miss = (predicted - actions).abs().flatten(1)
    edges = torch.linspace(-1, 1, NUM_BINS, device=actions.device)
    same = torch.bucketize(predicted.detach().clamp(-1, 1), edges) == torch.bucketize(actions.clamp(-1, 1), edges)
    return {"train_loss": miss.mean(-1), **accuracies(same.float().flatten(1), miss.detach())}


def accuracies(right: Tensor, miss: Tensor) -> Measures:
    """Means over the numbers of an action or chunk, (B, K A) twice; of a chunk also over its first action and the
    others, by the names of OpenVLA-OFT."""
    means = {"action_accuracy": right.mean(-1), "l1_loss": miss.mean(-1)}
    if right.shape[1] == ACTION_DIM:
        return means
    now, later = slice(None, ACTION_DIM), slice(ACTION_DIM, None)
    return means | {
        "curr_action_accuracy": right[:, now].mean(-1),
        "next_actions_accuracy": right[:, later].mean(-1),
        "curr_action_l1_loss": miss[:, now].mean(-1),
        "next_actions_l1_loss": miss[:, later].mean(-1),
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
