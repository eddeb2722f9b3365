"""Which family a checkpoint is of: found from its files, and never another than the flags say."""

import shutil
from pathlib import Path

import pytest
import torch
from farm_parts import adapter_of, tiny_with_statistics

from spvla.errors import CheckpointError, UserError
from spvla.files import write_json
from spvla.model.lora_file import STATISTICS
from spvla.model.weights import read_json
from spvla.policies import registry
from spvla.policies.checkpoint import policy_digest
from spvla.policies.registry import PLAIN_OPENVLA, PolicyFlags, describe, load_policy
from spvla.types import ONE_STEP


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_with_statistics(tmp_path_factory.mktemp("policies") / "tiny")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_a_folder_that_shows_no_more_is_plain_openvla(tiny: Path, tmp_path: Path) -> None:
    assert describe(tiny) == describe(adapter_of(tiny, tmp_path / "adapter", seed=1)) == PLAIN_OPENVLA
    assert load_policy(tiny).needs == ONE_STEP


def test_flags_that_say_what_the_folder_shows_change_nothing(tiny: Path) -> None:
    assert describe(tiny, PolicyFlags(use_l1_regression=False, use_proprio=False)) == PLAIN_OPENVLA


def test_flags_of_another_family_are_refused_for_a_folder_with_that_adapter_too(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--use_l1_regression True for"):
        describe(adapter_of(tiny, tmp_path / "adapter", seed=1), PolicyFlags(use_l1_regression=True))


def test_parts_of_another_family_are_never_left_out_silently(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", {"openvla": registry.FAMILIES["openvla"]})
    before = policy_digest(copy)
    torch.save({}, copy / "action_head--150000_checkpoint.pt")
    with pytest.raises(CheckpointError, match="with action_head--150000_checkpoint.pt"):
        describe(copy)
    with pytest.raises(CheckpointError):
        load_policy(copy)
    assert policy_digest(copy) != before


def test_statistics_of_the_robots_state_are_not_plain_openvlas(copy: Path) -> None:
    stats = read_json(copy / STATISTICS)
    stats["libero_object_no_noops"]["proprio"] = {"q01": [0.0] * 8, "q99": [0.0] * 7 + [0.04]}
    write_json(copy / STATISTICS, stats)
    with pytest.raises(CheckpointError, match="with proprio of libero_object_no_noops"):
        describe(copy)
