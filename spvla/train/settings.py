"""The device's memory, and the learning rate over the run."""

import math

from spvla.config import StepConfig

# The opponent and the policy take pieces of different sizes: fixed segments of one would lie idle under the other.
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def learning_rate(config: StepConfig, step: int) -> float:
    """Rate of optimiser step `step` = 0, 1, ...: linear warm-up, then constant, or falling to 0 at max_steps."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    done = min(1.0, max(0, step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.lr_schedule]
    return config.learning_rate * warm * shape
