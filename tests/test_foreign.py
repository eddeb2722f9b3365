"""`--policy package.module:function`: a Python object of the `Policy` protocol in the farm."""

import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeBenchmark

from spvla.config import EvaluateConfig
from spvla.errors import UserError
from spvla.eval.plan import describe_external, make_plan, unnorm_key
from spvla.policies import foreign
from spvla.policies.registry import NO_FLAGS, PolicyFlags
from spvla.types import Needs, Observation

SOURCE = """
import numpy as np
from spvla.types import Needs

MADE = []

class Mover:
    needs = Needs(chunk=2, execute=2)

    def __init__(self):
        MADE.append(self)

    def act(self, observations, *, unnorm_key, adapters=None):
        return np.full((len(observations), 2, 7), 0.25)

class Wrapped:
    def __init__(self):
        self.needs = Needs(proprio=True)

    def act(self, observations, *, unnorm_key, adapters=None):
        return np.zeros((len(observations), 1, 7))

def nothing():
    return 5
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the folder where the command was started."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return name


def test_an_object_is_found_where_the_command_starts_and_asked_as_it_is(module: str) -> None:
    found = foreign.describe(f"{module}:Mover", NO_FLAGS)
    assert found.description.needs == Needs(chunk=2, execute=2) and found.name == f"{module}:Mover"
    assert sys.modules[module].MADE == []  # its class says what it needs: none is made before it acts
    policy = foreign.open(found.description, number=0)
    policy.prepare(["move"])
    seen = Observation(images=(np.zeros((224, 224, 3), np.uint8),), instruction="move")
    assert policy.act([seen], unnorm_key="").shape == (1, 2, 7)


def test_needs_may_be_known_only_once_it_is_made(module: str) -> None:
    assert foreign.describe(f"{module}:Wrapped", NO_FLAGS).description.needs == Needs(proprio=True)


def test_it_is_another_policy_once_its_source_has_changed(module: str, tmp_path: Path) -> None:
    before = foreign.describe(f"{module}:Mover", NO_FLAGS).digest
    assert before != foreign.describe(f"{module}:Wrapped", NO_FLAGS).digest
    (tmp_path / f"{module}.py").write_text(SOURCE.replace("0.25", "0.5"))
    assert before != foreign.describe(f"{module}:Mover", NO_FLAGS).digest


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.to_be:found", "--policy nowhere.to_be:found"),
        ("{}:Nobody", "has no attribute 'Nobody'"),
        ("{}", "--policy"),
        ("{}:nothing", "made a int; expected an object with `needs`"),
    ],
)
def test_what_makes_no_policy_is_refused_before_any_work(spec: str, message: str, module: str) -> None:
    with pytest.raises(UserError, match=message):
        foreign.describe(spec.format(module), NO_FLAGS)


def test_flags_about_checkpoints_are_not_for_objects(module: str) -> None:
    with pytest.raises(UserError, match="with --policy"):
        foreign.describe(f"{module}:Mover", PolicyFlags(use_proprio=True))


def test_an_evaluation_plans_it_without_statistics(module: str) -> None:
    config = EvaluateConfig(policy=f"{module}:Mover", task_suite_name="libero_object", num_trials_per_task=1)
    config.check()
    plan = make_plan(config, FakeBenchmark(), [])
    assert [v.name for v in plan.versions] == [f"{module}:Mover"] and len(plan.trials) == 10
    assert set(plan.unnorm_keys.values()) == {"libero_object"}
    assert unnorm_key(describe_external(config), "libero_goal", "own") == "own"


def test_one_source_of_a_policy_is_enough() -> None:
    for flags in ({}, {"policy": "a:b", "policy_server": "ws://c"}, {"pretrained_checkpoint": "p", "policy": "a:b"}):
        with pytest.raises(UserError, match="one of --pretrained_checkpoint, --follow, --policy_server, --policy"):
            EvaluateConfig(**flags).check()
