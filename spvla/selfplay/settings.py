"""The training flags that one step depends on, and the learning rate over the run."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from spvla.config import TrainConfig
from spvla.selfplay.objective import LossType, Reduction

POLICY, OPPONENT = "policy", "opponent"  # names of the two adapters


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The training flags that one step depends on; see TrainConfig for their meaning."""

    objective: Literal["spin", "spvla", "sft"] = "spin"
    beta: float = 0.1
    eta: float = 0.0
    sft_weight: float = 0.0
    loss_type: LossType = "sigmoid"
    logp_reduction: Reduction = "sum"
    opponent_temperature: float = 0.0
    opponent_update: Literal["iteration", "ema"] = "iteration"
    ema_decay: float = 0.9999
    skip_hard_above: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    drop_collisions: bool = False
    use_lora: bool = True
    lora_dropout: float = 0.0
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    max_steps: int = 200_000
    seed: int = 7
    max_nonfinite_steps: int = 10
    compile: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> "StepConfig":
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})


def learning_rate(config: StepConfig, step: int) -> float:
    """Rate of optimiser step `step` = 0, 1, ...: linear warm-up, then constant, or falling to 0 at max_steps."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    done = min(1.0, max(0, step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.lr_schedule]
    return config.learning_rate * warm * shape
