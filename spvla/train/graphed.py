"""The policy's pass through the towers and the projector, with gradient.

It is thousands of kernels of a few microseconds each: a GPU would wait for the host to launch them. So there its
forward and its backward pass are each one CUDA graph. Everything trained is an input of the graphs, so that its
gradient comes out of them; being always in the same place, it is not copied.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from spvla.train.flat import Flat, FlatLora
from spvla.train.network import Network


class GraphedVisionEncoder:
    """Pixel values (B, 6, 224, 224) -> projected patches (B, 256, D), the policy's adapter being attached.

    recorded: as CUDA graphs, whose patches hold until the next call. Only of an adapter, and not with dropout, which
    must draw anew.
    """

    def __init__(self, network: Network, policy: Flat, *, recorded: bool) -> None:
        self.network, self.recorded = network, recorded
        pairs = policy.pairs if isinstance(policy, FlatLora) else {}
        vision = [pair for path, pair in pairs.items() if path.startswith(("vision_backbone.", "projector."))]
        self.trained = [leaf for pair in vision for leaf in (pair.a, pair.b)]
        self._passes: dict[torch.Size, Callable[..., Tensor]] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        if not self.recorded:
            return self.network.patches(pixels)
        if pixels.shape not in self._passes:
            self._passes.clear()  # activations are large: one shape at a time
            self._passes[pixels.shape] = self._record(pixels)
        return self._passes[pixels.shape](pixels, *self.trained)

    def _record(self, pixels: Tensor) -> Callable[..., Tensor]:
        def run(pixels: Tensor, *trained: Tensor) -> Tensor:
            return self.network.patches(pixels)

        return torch.cuda.make_graphed_callables(run, (pixels.clone(), *self.trained), allow_unused_input=True)
