"""The steps of a pass as a GPU runs them: compiled by torch and, for decoding, fused with quack's products."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from spvla.model.llama import Kernels, LlamaLayer
from spvla.model.vision import Projector, VisionBlock
from spvla.model.weights import torch_dtype


@cache
def training_kernels(backend: str = "inductor") -> Kernels:
    """For passes over whole sequences: half a layer at once, compiled anew for each shape, with and without gradient,
    with and without adapter."""
    _expect(64)
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
    return Kernels(
        run_block=torch.compile(VisionBlock.forward, **options),
        project=torch.compile(Projector.forward, **options),
        qkv=torch.compile(LlamaLayer.qkv, **options),
        attention=torch.compile(LlamaLayer.attention, **options),
        finish=torch.compile(LlamaLayer.finish, **options),
    )


@cache
def decoding_kernels(backend: str = "inductor") -> Kernels:
    """Each step compiled once for each shape, and shared by all layers and decoders of the process.

    Steps that packed prompts pass are compiled for any number of tokens. Deterministic: left to itself the compiler
    times padded products against plain ones, for a bucket that is no multiple of 8, and chooses otherwise now and then.
    """
    _expect(64)
    options: dict[str, Any] = {"fullgraph": True, "backend": backend}
    if backend == "inductor":
        options["options"] = {"deterministic": True}
    return Kernels(
        run_block=torch.compile(VisionBlock.forward, dynamic=False, **options),
        qkv=torch.compile(LlamaLayer.qkv, dynamic=False, **options),
        heads=torch.compile(LlamaLayer.heads, dynamic=True, **options),
        gate_up=torch.compile(LlamaLayer.gate_up, dynamic=True, **options),
    )


def _expect(shapes: int) -> None:
    """Lets torch compile a function for so many shapes."""
    torch._dynamo.config.recompile_limit = max(shapes, torch._dynamo.config.recompile_limit)


def gpu_kernels(dtype: torch.dtype) -> Kernels:
    """Compiled, and fused where this GPU and this installation have the products for a model of that type."""
    if not quack_version(dtype):
        return decoding_kernels()
    from spvla.model.kernels.hopper import fused

    return fused(decoding_kernels())


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
