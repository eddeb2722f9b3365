"""How well a policy predicts the demonstrated action: measures of each sample, all (B,), before any averaging.

Names are the original's: train_loss (cross entropy over the action tokens and the end), action_accuracy and l1_loss
(teacher-forced).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spvla.policies.openvla.actions import NUM_BINS, decode
from spvla.train.losses import cap_logits, token_logps
from spvla.train.scoring import Inputs
from spvla.types import ACTION_DIM

Measures = dict[str, Tensor]


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


def extremes(logits: Tensor) -> Tensor:
    """(2,) largest logit, and smallest negated, so that both are maxima."""
    low, high = torch.aminmax(logits.detach().float())
    return torch.stack((high, -low))
