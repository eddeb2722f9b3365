"""The steps of a layer as a GPU runs them while it decodes: compiled by torch, and fused with quack's products."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from spvla.model.llama import Kernels, LlamaLayer
from spvla.model.vision import Block
from spvla.model.weights import torch_dtype


@cache
def compiled_kernels(backend: str = "inductor") -> Kernels:
    """Each step compiled once for each shape, and shared by all layers and decoders of the process.

    Steps that packed prompts pass are compiled for any number of tokens. Deterministic: left to itself the compiler
    times padded products against plain ones, for a bucket that is no multiple of 8, and chooses otherwise now and then.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(64, limit)  # a few shapes for each bucket of the process
    options = {"fullgraph": True, "backend": backend}
    if backend == "inductor":
        options["options"] = {"deterministic": True}
    return Kernels(
        run_block=torch.compile(Block.forward, dynamic=False, **options),
        project=torch.compile(LlamaLayer.project, dynamic=False, **options),
        read=torch.compile(LlamaLayer.read, dynamic=True, **options),
        open=torch.compile(LlamaLayer.open, dynamic=True, **options),
    )


def gpu_kernels(dtype: torch.dtype) -> Kernels:
    """Compiled, and fused where this GPU and this installation have the products for a model of that type."""
    if not quack_version(dtype):
        return compiled_kernels()
    from spvla.model.kernels.hopper import fused

    return fused(compiled_kernels())


def quack_version(dtype: torch.dtype) -> str | None:
    """Of the fused products (hopper.py), where they can be had for a model of that type."""
    if torch.cuda.get_device_capability() != (9, 0) or dtype != torch.bfloat16:
        return None
    try:
        return version("quack-kernels")
    except PackageNotFoundError:
        return None


def arithmetic(device: str, dtype: str) -> str:
    """What an action's last bits depend on: "cpu", or the GPU's name, and the fused products if it has them."""
    if device == "cpu":
        return device
    quack = quack_version(torch_dtype(dtype))
    return torch.cuda.get_device_name() + (f", quack {quack}" if quack else "")
