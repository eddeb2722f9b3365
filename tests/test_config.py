"""Flags' values: each command refuses what a number cannot mean, with one line, before anything starts."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest

from spvla import cli, config
from spvla.errors import UserError

SOUND = {
    "regenerate": config.RegenerateConfig(demos="demos"),
    "evaluate": config.EvaluateConfig(pretrained_checkpoint="tiny"),
    "serve": config.ServeConfig(pretrained_checkpoint="tiny"),
    "sweep": config.SweepConfig(space={"beta": "0.3,0.7"}, train=config.TrainConfig()),
    "report": config.ReportConfig(run="run"),
    "status": config.StatusConfig(run="run"),
}
EVERY = {name: SOUND.get(name) or kind() for name, (kind, _) in cli.COMMANDS.items()}
OWN_RULE = {"eta", "ema_decay"}  # of either sign; 0 to 1


def numbers(of: Any) -> Iterator[str]:
    kinds = (int, float, int | None, float | None)
    return (f.name for f in fields(of) if f.type in kinds)


def refused(of: Any, flag: str, value: float) -> bool:
    """With one line that names the flag."""
    try:
        replace(of, **{flag: value}).check()
    except UserError as e:
        return str(e).startswith(f"--{flag} {value}; expected ")
    return False


@pytest.mark.parametrize("command", EVERY)
def test_the_defaults_are_sound(command: str) -> None:
    EVERY[command].check()


@pytest.mark.parametrize("command", EVERY)
def test_no_command_takes_a_number_that_its_flag_cannot_mean(command: str) -> None:
    ours = EVERY[command]
    for flag in numbers(ours):
        assert refused(ours, flag, float("nan")) and refused(ours, flag, float("inf")), flag
        assert flag in OWN_RULE or refused(ours, flag, -1), flag
        assert flag not in config.ABOVE_0 or refused(ours, flag, 0), flag
        assert flag not in config.BELOW_1 or refused(ours, flag, 1), flag
        assert flag not in config.AT_MOST_1 or refused(ours, flag, 1.01), flag


def test_every_bound_belongs_to_a_flag() -> None:
    flags = {flag for ours in EVERY.values() for flag in cli.flags_of(ours)}
    assert flags >= {*config.ABOVE_0, *config.AT_LEAST_0, *config.BELOW_1, *config.AT_MOST_1}
    assert not set(config.ABOVE_0) & set(config.AT_LEAST_0)


def test_zero_stays_what_it_is_said_to_mean() -> None:
    farm = {"num_envs": 0, "num_decoders": 0, "decode_batch_size": 0, "num_videos": 0, "max_failure_videos": 0}
    replace(SOUND["evaluate"], **farm, max_retries=0, wait_ms=0, num_steps_wait=0).check()
    replace(config.TrainConfig(), val_steps=0, max_failures=0, opponent_temperature=0.0, warmup_steps=0).check()
    replace(config.CollectConfig(), num_workers=0).check()
    assert refused(config.TrainConfig(), "num_workers", 0)


@pytest.mark.parametrize(
    ("command", "flag"), [("train", "beta"), ("evaluate", "seed"), ("train", "vla_path"), ("sweep", "num_envs")]
)
def test_a_flag_that_always_has_a_value_cannot_be_left_without(command: str, flag: str) -> None:
    assert refused(EVERY[command], flag, None)


def test_a_policy_is_quantised_in_one_way() -> None:
    with pytest.raises(UserError, match="--load_in_8bit True with --load_in_4bit True; expected one of the two"):
        replace(SOUND["evaluate"], load_in_8bit=True, load_in_4bit=True).check()
