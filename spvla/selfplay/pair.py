"""The policy's scores of both actions, with gradient.

On a GPU the forward and the backward pass are each one CUDA graph for each shape of text: the many small kernels of the
towers would otherwise wait for the host to launch them. Everything trained is an input of the graphs, so that its
gradient comes out of them; being always in the same place, it is not copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from spvla.policy.graphs import Pool
from spvla.selfplay.network import Loras, Network
from spvla.selfplay.scoring import Inputs, PairLogits, score_pair


class PairPass:
    """`score_pair`, its gradient reaching `trained`; `recorded` as graphs, where dropout must not draw anew."""

    def __init__(
        self, network: Network, loras: Loras, trained: Sequence[Tensor], *, recorded: bool, pool: Pool | None = None
    ) -> None:
        self.network, self.loras, self.trained = network, loras, tuple(trained)
        self.recorded, self.pool = recorded, pool
        self._passes: dict[torch.Size, Callable] = {}
        if recorded:  # made on this stream, so that gradients are added on it and not on the one that records
            self._accumulators = [t.view_as(t).grad_fn.next_functions[0][0] for t in self.trained]

    def __call__(self, inputs: Inputs, generated: Tensor) -> PairLogits:
        """Recorded logits hold until the next call."""
        if not self.recorded:
            return score_pair(self.network, inputs, generated, self.loras)
        tensors, shape = (*as_tuple(inputs), generated), inputs.text.shape
        if shape not in self._passes:
            self._passes.clear()  # activations are large: one shape at a time
            self._passes[shape] = self._record(tensors)
        real, after = self._passes[shape](*tensors, *self.trained)
        return PairLogits(real=real, generated=after)

    def _record(self, tensors: Sequence[Tensor]) -> Callable:
        def run(*given: Tensor) -> tuple[Tensor, Tensor]:
            *parts, generated = given[: len(tensors)]
            names = [field.name for field in fields(Inputs)]
            pair = score_pair(self.network, Inputs(**dict(zip(names, parts, strict=True))), generated, self.loras)
            return pair.real, pair.generated

        samples = (*(t.clone() for t in tensors), *self.trained)
        return torch.cuda.make_graphed_callables(run, samples, allow_unused_input=True, pool=self.pool)


def as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(getattr(inputs, field.name) for field in fields(Inputs))
