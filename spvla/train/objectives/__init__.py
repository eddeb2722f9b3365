"""Objectives by name: what a training step asks the reference policy for, and the loss."""

from spvla.config import StepConfig
from spvla.train.objectives.base import Objective
from spvla.train.objectives.sft import Sft
from spvla.train.objectives.spin import Spin
from spvla.train.objectives.spvla import Spvla

OBJECTIVES: dict[str, type[Objective]] = {"sft": Sft, "spin": Spin, "spvla": Spvla}


def objective_of(config: StepConfig) -> Objective:
    """The one that --objective names. Raises UserError for flags that do not fit it."""
    return OBJECTIVES[config.objective](config)
