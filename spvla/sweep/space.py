"""What a sweep varies: "0.3,0.7" is a grid, "uniform(0.3,0.9)" and "loguniform(1e-5,5e-4)" are ranges to draw from."""

import re
from dataclasses import fields, replace
from typing import Any

import draccus
from ray import tune

from spvla.config import TrainConfig
from spvla.errors import UserError
from spvla.files import paths_in
from spvla.train.prepare import require_flags

# Where things lie, and what the sweep itself plans with: one value for all trials.
_SHARED = (
    *("vla_path", "data_root_dir", "run_root_dir", "adapter_tmp_dir", "run_id", "run_id_note"),
    *("max_steps", "save_steps", "val_steps", "save_latest_checkpoint_only", "num_workers", "use_gpu"),
)
_WORDS = {"True": True, "False": False, "None": None}
_RANGE = re.compile(r"(uniform|loguniform)\(([^,()]+),([^,()]+)\)")


def search_space(space: dict[str, str], train: TrainConfig) -> dict[str, Any]:
    """{"beta": "0.3,0.7", "learning_rate": "loguniform(1e-5,5e-4)"} -> Tune's. Raises UserError.

    `train` holds the flags that all trials share.
    """
    if not space:
        raise UserError(
            "a sweep over nothing",
            expected="at least one training flag with a list or a range",
            remedy="Give, say, --beta 0.3,0.7 or --learning_rate 'loguniform(1e-5,5e-4)'.",
        )
    return {flag: domain(flag, text, train) for flag, text in space.items()}


def domain(flag: str, text: str, train: TrainConfig) -> Any:
    if flag in _SHARED:
        raise UserError(f"--{flag} {text}", expected="one value, which all trials share", remedy=f"Give one --{flag}.")
    if match := _RANGE.fullmatch(text.replace(" ", "")):
        low, high = (parsed(flag, word, train) for word in match.groups()[1:])
        if not (isinstance(low, float) and isinstance(high, float)):
            raise UserError(f"--{flag} {text}", expected="a list: a range has fractions", remedy="List the values.")
        if not low < high or (match[1] == "loguniform" and low <= 0):
            raise UserError(f"--{flag} {text}", expected="a low end below the high end", remedy="Swap or correct them.")
        return getattr(tune, match[1])(low, high)
    values = [parsed(flag, word.strip(), train) for word in paths_in(text)]
    return tune.grid_search(list(dict.fromkeys(values)))  # equal trials would share a folder


def parsed(flag: str, word: str, train: TrainConfig) -> Any:
    """The word as a value of that training flag, checked beside the others."""
    kind = next(f.type for f in fields(TrainConfig) if f.name == flag)
    try:
        value = draccus.decode(kind, _WORDS.get(word, word))
    except draccus.utils.DecodingError as e:
        name = kind.__name__ if isinstance(kind, type) else kind
        raise UserError(f"--{flag} {word}", expected=f"a value of type {name}", remedy=f"Correct --{flag}.") from e
    require_flags(replace(train, **{flag: value}))
    return value
