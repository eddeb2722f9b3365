"""CUDA graphs: a pass recorded once and replayed without the host's help, on static tensors."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

WARM_UPS = 2  # passes before the recorded one: the first compiles

Out = TypeVar("Out")


def record(run: Callable[[], Out], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Out]:
    """Records `run`, which reads and writes the same tensors each time. Its result is filled by every replay.

    On a stream of its own; other threads may go on meanwhile. pool: the memory of another graph, which then never runs
    at the same time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        out = run()
    return graph, out
