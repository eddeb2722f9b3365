"""Weights in 8 or 4 bits, by bitsandbytes on a GPU: what `load_in_8bit` and `load_in_4bit` ask for.

As in transformers, every linear map but lm_head is quantised while it is loaded; embeddings, norms and the patch
convolutions keep their type. Maps still carry resident LoRA versions, in the model's own type.
"""

import torch
from torch import Tensor, nn

from spvla.errors import UserError
from spvla.policy.linear import Linear, Stack

KEPT = ("lm_head",)


def quantise(model: nn.Module, *, bits: int, dtype: torch.dtype, device: str) -> None:
    """Replaces the linear maps of a model on the meta device by quantised ones, to be filled by their `place`."""
    flag = f"load_in_{bits}bit"
    if not device.startswith("cuda"):
        raise UserError(f"{flag} on {device}", expected="a GPU", remedy=f"Give device='cuda', or leave {flag} out.")
    try:
        import bitsandbytes as bnb
    except ImportError as e:
        raise UserError(
            f"{flag} without bitsandbytes",
            expected="the extra 'quantized'",
            remedy="Run: pip install 'spvla[quantized]'",
        ) from e
    make = _eight_bit(bnb) if bits == 8 else _four_bit(bnb, dtype)
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if type(module) is Linear and leaf not in KEPT:
            setattr(model.get_submodule(parent), leaf, make(module))


def _eight_bit(bnb):  # type: ignore[no-untyped-def]
    class Linear8bit(bnb.nn.Linear8bitLt):
        """LLM.int8 (arxiv.org/abs/2208.07339)."""

        lora: Stack | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if self.lora is None else self.lora.add(x, y)

        def place(self, leaf: str, value: Tensor, device: str) -> nn.Parameter:
            if leaf == "bias":
                return nn.Parameter(value.to(device), requires_grad=False)
            return bnb.nn.Int8Params(value.half(), requires_grad=False, has_fp16_weights=False).to(device)

    def make(old: Linear) -> nn.Module:
        with torch.device("meta"):
            return Linear8bit(
                old.in_features, old.out_features, old.bias is not None, has_fp16_weights=False, threshold=6.0
            )

    return make


def _four_bit(bnb, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    class Linear4bit(bnb.nn.Linear4bit):
        """Blocks of 4-bit floats (arxiv.org/abs/2305.14314); products in the model's type."""

        lora: Stack | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if self.lora is None else self.lora.add(x, y)

        def place(self, leaf: str, value: Tensor, device: str) -> nn.Parameter:
            if leaf == "bias":
                return nn.Parameter(value.to(device), requires_grad=False)
            return bnb.nn.Params4bit(value, requires_grad=False, quant_type="fp4", module=self).to(device)

    def make(old: Linear) -> nn.Module:
        with torch.device("meta"):
            return Linear4bit(
                old.in_features, old.out_features, old.bias is not None, compute_dtype=dtype, quant_type="fp4"
            )

    return make
