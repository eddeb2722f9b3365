"""The original self-play fork's form: each model's own most likely tokens take the place of a generated action.

Nothing is generated: both models see the demonstrated tokens, and at each position the log-prob of the token that the
model itself finds most likely stands for y'. So policy and reference score two different sequences.
"""

import torch
from torch import Tensor

from spvla.train.family import Family
from spvla.train.objectives.pairs import PairObjective
from spvla.train.scoring import Inputs, ReferenceOutput


class Spvla(PairObjective):
    @torch.no_grad()
    def answer(self, family: Family, inputs: Inputs, uniforms: Tensor) -> ReferenceOutput:
        logits = family.score(inputs)[:, : inputs.real.shape[1]]
        return ReferenceOutput(
            generated=logits.argmax(-1),
            real_logps=self.sampler.logps(logits, inputs.real),
            generated_logps=self.sampler.greedy(logits),
        )

    def score(
        self, family: Family, inputs: Inputs, reference: ReferenceOutput, patches: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = family.score(inputs, patches=patches)
        return logits, self.sampler.greedy(logits[:, : inputs.real.shape[1]])
