"""What a sweep varies: "0.3,0.7" is a grid, "uniform(0.3,0.9)" and "loguniform(1e-5,5e-4)" are ranges to draw from."""

import re
from dataclasses import fields, replace
from typing import Any

import draccus
from ray import tune

from spvla.config import TrainConfig
from spvla.errors import UserError

_RANGE = re.compile(r"(uniform|loguniform)\(([^,()]+),([^,()]+)\)")


def search_space(space: dict[str, str]) -> dict[str, Any]:
    """{"beta": "0.3,0.7", "learning_rate": "loguniform(1e-5,5e-4)"} -> Tune's. Raises UserError."""
    if not space:
        raise UserError(
            "a sweep over nothing",
            expected="at least one training flag with a list or a range",
            remedy="Give, say, --beta 0.3,0.7 or --learning_rate 'loguniform(1e-5,5e-4)'.",
        )
    return {flag: domain(flag, text) for flag, text in space.items()}


def domain(flag: str, text: str) -> Any:
    if match := _RANGE.fullmatch(text.replace(" ", "")):
        low, high = (parsed(flag, word) for word in match.groups()[1:])
        if not low < high or (match[1] == "loguniform" and low <= 0):
            raise UserError(f"--{flag} {text}", expected="a low end below the high end", remedy="Swap or correct them.")
        return getattr(tune, match[1])(low, high)
    return tune.grid_search([parsed(flag, word) for word in text.split(",")])


def parsed(flag: str, word: str) -> Any:
    """The word as a value of that training flag, checked by TrainConfig."""
    kind = next(f.type for f in fields(TrainConfig) if f.name == flag)
    try:
        value = draccus.decode(kind, word)
    except draccus.utils.DecodingError as e:
        raise UserError(f"--{flag} {word}", expected=f"a value of type {kind}", remedy=f"Correct --{flag}.") from e
    replace(TrainConfig(), **{flag: value}).check()
    return value
