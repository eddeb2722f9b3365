"""What an objective is: what it asks the reference policy for, and the losses of a micro-batch.

A new one is a subclass of `Objective` in a file of its own and a line in `objectives/__init__.py`; flags that it reads
are fields of `StepConfig`. Nothing else in the project knows the objectives' names.

Legend: B batch, A action tokens (7 K), R rows with logits.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from spvla.config import StepConfig
from spvla.train.family import Family
from spvla.train.measures import Columns, Measures, imitation, regression
from spvla.train.scoring import Inputs, ReferenceOutput, TokenSampler


@dataclass(frozen=True, kw_only=True)
class Losses:
    """A micro-batch's. A step's loss is the mean of `sample` over samples plus that of `pair` over those that count."""

    sample: Tensor  # (B,)
    pair: Tensor | None = None  # (B,)
    measures: Measures  # (B,) each; their means over all samples are metrics
    outputs: Tensor  # logits (B, A, V) of the demonstrated action, or regressed numbers; their extremes are metrics
    is_hard: Tensor | None = None  # () bool: this micro-batch is to be left out


class Objective(ABC):
    """One for each Learner. Its constructor raises UserError for flags that do not fit."""

    label: str  # in a run's name: the objective, and the flags that one compares by

    def __init__(self, config: StepConfig) -> None:
        self.config = config
        self.sampler = TokenSampler(
            temperature=config.opponent_temperature,
            logit_scale=config.logit_scale,
            logit_softcap=config.logit_softcap,
        )

    @property
    def has_reference(self) -> bool:
        """Whether a reference policy (the opponent) answers each batch before the policy learns from it."""
        return False

    def answer(self, family: Family, inputs: Inputs, uniforms: Tensor) -> ReferenceOutput:
        """What is asked of the reference policy, whose adapter is attached; `uniforms` (B, A) decide what is drawn."""
        raise NotImplementedError

    def answer_key(self) -> tuple[object, ...]:
        """What `answer` depends on, beside reference policy and batch: equal keys, equal answers."""
        return self.config.objective, self.sampler, self.config.seed

    def counts(self, inputs: Inputs, reference: ReferenceOutput | None) -> Tensor | None:
        """(B,) bool: pairs that count. None: all of them, known without asking the device."""
        return None

    def is_hard(self, cross_entropy: Tensor) -> Tensor | None:
        """() bool, as --skip_hard_above says: the fork's way with what a policy cannot learn from yet."""
        limit = self.config.skip_hard_above
        return None if limit is None else cross_entropy.detach().mean() >= limit

    @abstractmethod
    def losses(
        self, family: Family, inputs: Inputs, reference: ReferenceOutput | None, columns: Columns, patches: Tensor
    ) -> Losses:
        """The policy's, whose adapter is attached. `patches` are the images', with their gradient."""

    def validate(self, family: Family, inputs: Inputs, columns: Columns) -> Measures:
        """(B,) each, of held-out data."""
        return self.imitate(family, inputs, columns)[0]

    def imitate(
        self, family: Family, inputs: Inputs, columns: Columns, patches: Tensor | None = None
    ) -> tuple[Measures, Tensor]:
        """Behaviour cloning's measures, and the logits (B, R, V), or regressed actions (B, K, 7), that they are of."""
        if family.regresses:
            predicted = family.regress(inputs, patches=patches)
            return regression(predicted, inputs.actions), predicted
        logits = family.score(inputs, patches=patches)
        return imitation(logits, inputs, columns, self.config.logit_softcap), logits
