"""The policy's pass through the towers and the projector, with gradient.

It is thousands of kernels of a few microseconds each: a GPU would wait for the host to launch them. So there its
forward and its backward pass are each one CUDA graph. Everything trained is an input of the graphs, so that its
gradient comes out of them; being always in the same place, it is not copied.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from spvla.train.network import Loras, Network


class Towers:
    """Pixel values (B, 6, 224, 224) -> projected patches (B, 256, D).

    recorded: as CUDA graphs, whose patches hold until the next call. Not with dropout, which must draw anew.
    """

    def __init__(self, network: Network, loras: Loras, *, recorded: bool) -> None:
        self.network, self.loras, self.recorded = network, loras, recorded
        sites = [loras(site) for site in network.sites if site.startswith(("vision_backbone", "projector"))]
        self.trained = [leaf for lora in sites if lora is not None for leaf in (lora.a, lora.b)]
        self._passes: dict[torch.Size, Callable[..., Tensor]] = {}

    def __call__(self, pixels: Tensor) -> Tensor:
        if not self.recorded:
            return self.network.patches(pixels, self.loras)
        if pixels.shape not in self._passes:
            self._passes.clear()  # activations are large: one shape at a time
            self._passes[pixels.shape] = self._record(pixels)
        return self._passes[pixels.shape](pixels, *self.trained)

    def _record(self, pixels: Tensor) -> Callable[..., Tensor]:
        def run(pixels: Tensor, *trained: Tensor) -> Tensor:
            return self.network.patches(pixels, self.loras)

        return torch.cuda.make_graphed_callables(run, (pixels.clone(), *self.trained), allow_unused_input=True)
