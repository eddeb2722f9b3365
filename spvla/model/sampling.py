"""Tokens drawn from logits: one way for decoding and training, in float64, decided by numbers that are given.

Legend: B batch, V vocabulary.
"""

import torch
from torch import Tensor


def draw(logits: Tensor, temperature: Tensor | float, uniforms: Tensor) -> Tensor:
    """Logits (B, V) float32, temperature above 0, uniforms (B,) in [0, 1) -> ids (B,).

    By inverting the cumulative distribution.
    """
    cumulative = (logits / temperature).softmax(-1).double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
    return drawn.clamp(max=logits.shape[-1] - 1)


def choose(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> Tensor:
    """`draw`, each row at its own temperature (B,); at 0 the most likely token."""
    warm = torch.where(temperatures > 0, temperatures, torch.ones_like(temperatures))
    return torch.where(temperatures > 0, draw(logits, warm[:, None], uniforms), logits.argmax(-1))
