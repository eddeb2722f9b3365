"""Token ids of a chunk, and its actions.

Legend: B batch, K chunk, A action dims (7), S slots (K A), T text tokens.
"""

from collections.abc import Sequence

import numpy as np

from spvla.policies.openvla.actions import ActionStats, decode
from spvla.policies.openvla.prompt import EOS, PAD
from spvla.types import ACTION_DIM

NEVER_READ = 0  # stands where the slots are: their embeddings are zeros


def prompt_text(prompts: Sequence[Sequence[int]], slots: int, width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompts (BOS ... 29871) -> ids (B, T) with slots, stop and padding, and the slots' first column (B,).

    T is what the longest needs, or `width` if that is more.
    """
    start = np.array([len(p) for p in prompts])
    text = np.full((len(prompts), max(width, int(start.max()) + slots + 1)), PAD, np.int64)
    for row, prompt in zip(text, prompts, strict=True):
        row[: len(prompt) + slots + 1] = [*prompt, *[NEVER_READ] * slots, EOS]
    return text, start


def decode_chunk(ids: np.ndarray) -> np.ndarray:
    """Ids (..., K A), step by step -> normalised actions (..., K, A). An id that is no action clips to the nearest."""
    return decode(ids).reshape(*ids.shape[:-1], -1, ACTION_DIM)


def unnormalise(normalised: np.ndarray, stats: ActionStats) -> np.ndarray:
    """(..., A) -> dataset form, float64. Unlike plain OpenVLA this family adds 1e-8 to the span."""
    n = np.asarray(normalised, np.float64)
    return np.where(stats.mask, 0.5 * (n + 1) * (stats.q99 - stats.q01 + 1e-8) + stats.q01, n)
