"""Copies between the host and a device that nobody waits for."""

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """From pinned memory, out of which a GPU copies by itself; torch keeps it until the copy is done."""
    if torch.device(device).type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


class AsyncHostCopy:
    """Copies to the host. From a GPU they go to pinned memory, in turn with its other work."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = [t.detach().to("cpu", non_blocking=True, copy=True) for t in tensors]
        self.done = torch.cuda.Event() if tensors[0].is_cuda else None
        if self.done is not None:
            self.done.record()

    def read(self) -> list[Tensor]:
        """Waits until they are there, not for what the device was given afterwards."""
        if self.done is not None:
            self.done.synchronize()
        return self.tensors
