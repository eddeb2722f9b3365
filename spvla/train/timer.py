"""Where a step's time goes, without waiting for the device before its end."""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StepTimer:
    """Adds up the seconds of named parts. On a GPU they are marked by events and read once, after the last."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: dict[str, list[tuple[Any, ...]]] = defaultdict(list)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._mark()
        yield
        self.marks[part].append((start, self._mark()))

    def seconds(self) -> dict[str, float]:
        """{"data_s": ..., "forward_s": ...}. On a GPU the device must have been waited for."""
        return {f"{part}_s": sum(self._between(*pair) for pair in pairs) for part, pairs in self.marks.items()}

    def _mark(self) -> "float | torch.cuda.Event":
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
        return start.elapsed_time(end) / 1e3 if self.on_gpu else end - start


def memory_gib(device: torch.device) -> float:
    """Peak of the device's memory that torch took, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
