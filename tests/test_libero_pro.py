"""LIBERO-PRO's suites, by their files: what changes, what stays, and what the package lacks."""

import pickle
from pathlib import Path

import pytest

from spvla.benchmarks import registry
from spvla.benchmarks.libero import suites as libero
from spvla.benchmarks.libero_pro import suites as pro
from spvla.benchmarks.libero_pro.objects import LIKES
from spvla.benchmarks.registry import BenchmarkFlags, perturbed
from spvla.config import EvaluateConfig
from spvla.errors import UserError
from spvla.eval.plan import benchmark_of, chosen_tasks
from spvla.types import Benchmark

PRIMITIVES = BenchmarkFlags(libero_assets=Path("primitives"))


def opened(suites: str) -> Benchmark:
    return registry.find(suites, PRIMITIVES)


@pytest.mark.parametrize("suite", pro.SUITES)
def test_tasks_are_liberos_in_its_order_with_files_of_their_own(suite: str) -> None:
    tasks, originals = pro.tasks(suite), libero.tasks(pro.base_of(suite))
    assert [t.name for t in tasks] == [t.name for t in originals] and len(tasks) == 10
    assert all(t.bddl_file.is_file() and t.init_file.is_file() for t in tasks)
    pairs = zip(tasks, originals, strict=True)
    assert all(t.bddl_file.read_text() != original.bddl_file.read_text() for t, original in pairs)


def test_the_wording_changes_only_where_it_is_what_is_changed() -> None:
    original = [t.instruction for t in libero.tasks("libero_goal")]
    words = {end: [t.instruction for t in pro.tasks(f"libero_goal_{end}")] for end in ("object", "swap", "lan", "task")}
    assert words["object"] == words["swap"] == original
    assert words["lan"][0] == "open the cabinet’s middle drawer"
    assert (
        words["task"][0] == "open the bottom drawer of the cabinet" and words["task"][1] == "Put the plate on the stove"
    )


def test_language_leaves_the_world_as_it_is() -> None:
    for task, original in zip(pro.tasks("libero_object_lan"), libero.tasks("libero_object"), strict=True):
        assert task.models == original.models


def test_perturbations_name_suites() -> None:
    both = perturbed("libero_object,libero_goal", "position,language")
    assert both == "libero_object_swap,libero_object_lan,libero_goal_swap,libero_goal_lan"
    assert benchmark_of(EvaluateConfig(task_suite_name=both, libero_assets=Path("primitives"))).suites == pro.SUITES


@pytest.mark.parametrize(
    ("suite", "how", "there"),
    [
        ("libero_spatial", "position", "object, language, task"),  # the package has its init states alone
        ("libero_object", "environment", "object, position, language, task"),
        ("libero_90", "object", "(none)"),
    ],
)
def test_a_perturbation_that_a_suite_lacks_is_refused_with_those_it_has(suite: str, how: str, there: str) -> None:
    with pytest.raises(UserError, match=f"--perturb {how} of {suite}") as refusal:
        perturbed(suite, how)
    assert refusal.value.expected.startswith(f"one of {there}, ")


def test_a_task_whose_file_is_empty_is_left_out_by_the_line_that_refuses_it() -> None:
    benchmark = opened("libero_spatial_task")
    with pytest.raises(UserError, match="libero_spatial_task task 3 has no init states") as refusal:
        chosen_tasks(benchmark, "libero_spatial_task", (), trials=1)
    playable = [int(word) for word in refusal.value.remedy.split()[-1].strip(".").split(",")]
    assert playable == [0, 1, 2, 4, 5, 6, 8, 9]
    assert len(chosen_tasks(benchmark, "libero_spatial_task", playable, trials=50)) == 8


def test_an_object_that_the_assets_lack_is_named() -> None:
    with pytest.raises(UserError, match="libero_object_object task 0 needs .*red_basket, which the primitives assets"):
        opened("libero_object_object").require([("libero_object_object", 0)])
    opened("libero_object_swap").require([("libero_object_swap", task) for task in range(10)])


def test_every_object_is_liberos_or_known_to_be_handled_as_one() -> None:
    ours = {model for suite in libero.SUITES for task in libero.tasks(suite) for model in task.models}
    theirs = {model for suite in pro.SUITES for task in pro.tasks(suite) for model in task.models}
    assert theirs - ours - LIKES.keys() == {"white_white_porcelain_mug"}  # no package has it
    assert set(LIKES.values()) <= ours and not LIKES.keys() & ours


def test_results_name_the_benchmark_and_are_never_taken_for_liberos() -> None:
    facts, plain = opened("libero_object_swap").facts(), opened("libero_object").facts()
    assert facts["benchmark"] == "libero_pro" and registry.benchmark_of(facts) == "libero_pro"
    assert facts["tasks_digest"] != plain["tasks_digest"] and facts["libero_pro"] == "0.1.3"
    assert pickle.loads(pickle.dumps(opened("libero_object_swap"))).facts() == facts
    with pytest.raises(UserError, match="suites of one benchmark"):
        opened("libero_object,libero_object_swap")


def test_a_policy_uses_the_statistics_of_the_suite_that_it_learnt() -> None:
    benchmark = opened("libero_goal_lan")
    assert benchmark.trained_on("libero_goal_lan") == "libero_goal" and benchmark.max_steps("libero_goal_lan") == 300
    assert opened("libero_goal").trained_on("libero_goal") == "libero_goal"
