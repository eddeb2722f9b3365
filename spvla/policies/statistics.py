"""dataset_statistics.json (and `norm_stats` of config.json): what it must hold for a policy to act by it.

{data set: {"action": {"q01": [7 numbers], "q99": ..., "mask": [7 booleans], "min", "max", "mean", "std"},
            "proprio": {...}, ...}}

A policy that acts by statistics that cannot be gives a success rate and no error, so they are refused before it starts.
"""

from collections.abc import Mapping
from typing import (
    Annotated,
    Any,
    Required,  # typing's own serves pydantic from Python 3.12 on
)

import numpy as np
from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from spvla.errors import CheckpointError, UserError
from spvla.reading import require_form
from spvla.types import ACTION_DIM

_A = Field(min_length=ACTION_DIM, max_length=ACTION_DIM)
_Numbers = Annotated[list[FiniteFloat], _A]


class _Action(TypedDict, total=False):
    q01: Required[_Numbers]
    q99: Required[_Numbers]
    mask: Annotated[list[bool], _A]
    min: _Numbers
    max: _Numbers
    mean: _Numbers
    std: _Numbers


class _Entry(TypedDict, total=False):
    action: Required[_Action]
    proprio: dict[str, list[FiniteFloat | bool]]


def require_statistics(
    stats: Any, place: str, *, error: type[UserError] = CheckpointError, remedy: str = ""
) -> dict[str, Any]:
    """`stats`, if a policy can act by every entry. Raises `error` naming the data set and the field.

    A dimension that never varies is data; where none of those that are scaled does, nothing was measured.
    """
    remedy = remedy or "Take the dataset_statistics.json of the run or release that the checkpoint comes from."
    require_form(stats, dict[str, _Entry], place, remedy=remedy, error=error)
    for key, entry in stats.items():
        if wrong := _wrong(entry["action"]):
            got, expected = wrong
            raise error(f"{place} holds {got} at {key}.action", expected=expected, remedy=remedy)
    return stats


def _wrong(action: Mapping[str, list[Any]]) -> tuple[str, str] | None:
    """(what is there, what was expected), or None."""
    low, high = np.array(action["q01"], float), np.array(action["q99"], float)
    mask = np.array(action.get("mask", [True] * ACTION_DIM))
    if (low > high).any():
        i = int(np.argmax(low > high))
        return f"q01 {low[i]:g} above q99 {high[i]:g} in dimension {i}", "the 1st percentile and the 99th"
    if mask.any() and (low == high)[mask].all():
        return "q01 equal to q99 in every dimension that is scaled", "percentiles of actions that vary"
    return None
