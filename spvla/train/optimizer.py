"""The end of a step: clip, AdamW and moving average, decided on the device, so that the host need not wait for it.

A step that is not finite, or whose micro-batches were all hard, is skipped: weights, moments and AdamW's count of steps
stay as they are, bit for bit.
"""

import torch
from torch import Tensor, nn

from spvla.config import StepConfig
from spvla.train.flat import Flat


class Optimizer:
    """AdamW over one flat vector and its `gradient` (N,) float32; `average`, if any, follows it.

    Over all of it, the vocabulary's rows included that a batch does not hold: a few passes over the vector are quick
    beside a step.
    """

    def __init__(self, policy: Flat, average: Flat | None, config: StepConfig) -> None:
        self.policy, self.average, self.config = policy, average, config
        self.gradient = torch.zeros_like(policy.master)
        parameter = nn.Parameter(policy.master)
        parameter.grad = self.gradient
        self.matrices = policy.matrices() if config.weight_decay_on == "matrices" else None
        self.adamw = torch.optim.AdamW(
            [parameter],
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay if self.matrices is None else 0.0,
            fused=True,
        )

    @torch.no_grad()
    def update(self, loss: Tensor, hard_rate: Tensor | None, rate: float) -> dict[str, Tensor]:
        """Steps with learning rate `rate`. Gives the gradient's norm before clipping, and 1.0 if it was skipped."""
        norm = self.gradient.square().sum().sqrt()  # `norm` adds up one by one on a CPU, and loses small terms
        spoilt = ~(loss.isfinite() & norm.isfinite())
        skipped = (spoilt if hard_rate is None else spoilt | (hard_rate > 1 - 1e-6)).float()
        if self.config.max_grad_norm is not None:
            self.gradient.mul_((self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.found_inf = skipped  # where torch's GradScaler says it too: at 1 fused AdamW changes nothing
        if self.matrices is not None:
            self.policy.master.mul_(1 - rate * self.config.weight_decay * (1 - skipped) * self.matrices)
        self.adamw.step()
        self.policy.refresh()
        if self.average is not None:
            self.average.master.lerp_(self.policy.master, (1 - self.config.ema_decay) * (1 - skipped))
            self.average.refresh()
        return {"grad_norm": norm, "skipped": skipped}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state, a copy; empty before the first step."""
        state = self.adamw.state_dict()["state"].get(0, {})
        return {name: value.clone() for name, value in state.items()}

    def load(self, moments: dict[str, Tensor]) -> None:
        groups = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({"state": {0: moments} if moments else {}, "param_groups": groups})
