"""Tensors on their way from the device to the host."""

import torch
from torch import Tensor


class Landing:
    """Copies that were asked for without a wait. On a GPU they go to pinned memory, in turn with its other work."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = [t.detach().to("cpu", non_blocking=True) for t in tensors]
        self.landed = torch.cuda.Event() if tensors[0].is_cuda else None
        if self.landed:
            self.landed.record()

    def read(self) -> list[Tensor]:
        """Waits until they are there, not for what the device was given afterwards."""
        if self.landed:
            self.landed.synchronize()
        return self.tensors
