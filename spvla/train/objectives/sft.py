"""Behaviour cloning: the cross entropy of the demonstrated tokens, or the distance of regressed numbers."""

from torch import Tensor

from spvla.train.family import Family
from spvla.train.measures import Columns
from spvla.train.objectives.base import Losses, Objective
from spvla.train.scoring import Inputs, ReferenceOutput


class Sft(Objective):
    label = "sft"

    def losses(
        self, family: Family, inputs: Inputs, reference: ReferenceOutput | None, columns: Columns, patches: Tensor
    ) -> Losses:
        measures, outputs = self.imitate(family, inputs, columns, patches)
        return Losses(
            sample=measures["train_loss"],
            measures=measures,
            outputs=outputs[:, : inputs.real.shape[1]],
            is_hard=self.is_hard(measures["train_loss"]),
        )
