"""SPIN (arxiv.org/abs/2401.01335): prefer the demonstrated action over one that the reference policy proposes.

One y' of the reference's own (greedy, or drawn at --opponent_temperature) is scored by both models, in one pass over a
shared prefix.
"""

from torch import Tensor

from spvla.train.family import Family
from spvla.train.objectives.pairs import PairObjective
from spvla.train.scoring import Inputs, ReferenceOutput


class Spin(PairObjective):
    def answer(self, family: Family, inputs: Inputs, uniforms: Tensor) -> ReferenceOutput:
        return family.propose(inputs, self.sampler, uniforms)

    def score(
        self, family: Family, inputs: Inputs, reference: ReferenceOutput, patches: Tensor
    ) -> tuple[Tensor, Tensor]:
        pair = family.score_pair(inputs, reference.generated, patches=patches)
        return pair.real, self.sampler.logps(pair.generated, reference.generated)
