"""Weights in 8 or 4 bits, by bitsandbytes on a GPU: what `load_in_8bit` and `load_in_4bit` ask for.

As in transformers, every linear map but lm_head is quantised while it is loaded; embeddings, norms and the patch
convolutions keep their type. Maps still carry resident LoRA versions, in the model's own type.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from spvla.errors import UserError
from spvla.model.linear import FusedLinear, Linear
from spvla.model.lora import Lora

KEPT = ("lm_head",)


def require_quantiser(*, bits: int, device: str) -> None:
    """Raises UserError where weights of so many bits cannot be had."""
    flag = f"load_in_{bits}bit"
    if not device.startswith("cuda"):
        raise UserError(f"{flag} on {device}", expected="a GPU", remedy=f"Give device='cuda', or leave {flag} out.")
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"{flag} without bitsandbytes",
            expected="the extra 'quantized'",
            remedy="Run: pip install 'spvla[quantized]'",
        )


def quantise(model: nn.Module, *, bits: int, dtype: torch.dtype) -> None:
    """Replaces the linear maps of a model on the meta device by quantised ones, to be filled by their `place`."""
    make = _maker(bits, dtype)
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if type(module) in (Linear, FusedLinear) and leaf not in KEPT:
            with torch.device("meta"):
                quantised = make(module)
            if isinstance(module, FusedLinear):
                quantised.parts = module.parts
            setattr(model.get_submodule(parent), leaf, quantised)


def is_quantised(model: nn.Module) -> bool:
    return any(hasattr(module, "place") for module in model.modules())


def _maker(bits: int, dtype: torch.dtype) -> Callable[[Linear], nn.Module]:
    import bitsandbytes as bnb

    class Served:
        """What a decoder and a checkpoint's reader ask of either kind of map."""

        lora: Lora | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if self.lora is None else self.lora.add(x, y)

        def after(self, x: Tensor, first: int) -> Tensor:
            """As FusedLinear's; the product cannot be cut."""
            return self(x)[..., sum([*self.parts.values()][:first]) :]

        def place(self, leaf: str, value: Tensor, device: str) -> nn.Parameter:
            """The parameter `leaf`, "weight" or "bias", from a checkpoint's tensor."""
            if leaf == "bias":
                return nn.Parameter(value.to(device), requires_grad=False)
            return self.quantised(value).to(device)

    class Linear8bit(Served, bnb.nn.Linear8bitLt):
        """LLM.int8 (arxiv.org/abs/2208.07339)."""

        def quantised(self, weight: Tensor) -> nn.Parameter:
            return bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)

    class Linear4bit(Served, bnb.nn.Linear4bit):
        """Blocks of 4-bit floats (arxiv.org/abs/2305.14314); products in the model's type."""

        def quantised(self, weight: Tensor) -> nn.Parameter:
            return bnb.nn.Params4bit(weight, requires_grad=False, quant_type="fp4", module=self)

    kind, options = {
        8: (Linear8bit, {"has_fp16_weights": False, "threshold": 6.0}),
        4: (Linear4bit, {"compute_dtype": dtype, "quant_type": "fp4"}),
    }[bits]
    return lambda old: kind(old.in_features, old.out_features, old.bias is not None, **options)
