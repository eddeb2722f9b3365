"""Benchmarks by the names of their suites, and LIBERO as one of them."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeBenchmark

from spvla.benchmarks import registry
from spvla.benchmarks.libero.benchmark import Libero
from spvla.benchmarks.registry import BenchmarkFlags, find
from spvla.errors import UserError
from spvla.types import Benchmark

PRIMITIVES = BenchmarkFlags(libero_assets=Path("primitives"))


class Moves(FakeBenchmark):
    suites = ("moves",)

    def __init__(self, flags: BenchmarkFlags) -> None:
        super().__init__()


@pytest.fixture
def two_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BENCHMARKS, "one number", f"{__name__}:Moves")


def test_a_suite_is_found_without_importing_a_simulator() -> None:
    script = (
        "import sys; from spvla.benchmarks.registry import *;"
        "b = find('libero_spatial,libero_10', BenchmarkFlags());"
        "print(b.instructions('libero_10')[0], b.max_steps('libero_10')); print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said, modules = run.stdout.splitlines()
    assert said == "put both the alphabet soup and the tomato sauce in the basket 520"
    assert not {"mujoco", "robosuite", "libero", "torch"} & set(modules.split())


def test_an_unknown_suite_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="--task_suite_name libero_kitchen; expected one of libero_spatial"):
        find("libero_object,libero_kitchen", BenchmarkFlags())


@pytest.mark.usefixtures("two_benchmarks")
def test_a_second_benchmark_is_a_class_and_a_line() -> None:
    assert find("moves", BenchmarkFlags()).max_steps("moves") == 280
    with pytest.raises(UserError, match="suites of one benchmark"):
        find("moves,libero_object", BenchmarkFlags())


def test_libero_says_what_decides_its_worlds() -> None:
    libero: Benchmark = Libero(PRIMITIVES)
    facts = libero.facts()
    assert facts["assets"] == "primitives"
    assert {"assets_digest", "tasks_digest", "mujoco", "robosuite", "libero"} < facts.keys()
    assert libero.num_init_states("libero_object", 3) == 50
    libero.require([("libero_object", 3)])


def test_libero_travels_as_its_flags() -> None:
    libero = Libero(replace(PRIMITIVES, any_mujoco=True))
    libero.facts()
    there = pickle.loads(pickle.dumps(libero))
    assert there.flags == libero.flags and "asset_set" not in vars(there)


def test_tasks_are_refused_under_a_mujoco_that_makes_others_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spvla.benchmarks.libero.versions.installed_mujoco", lambda: "3.8.1")
    with pytest.raises(UserError, match="MuJoCo 3.8.1, .* --any_mujoco True"):
        Libero(PRIMITIVES).require([("libero_object", 3)])
    told = Libero(replace(PRIMITIVES, any_mujoco=True))
    told.require([("libero_object", 3)])
    assert told.facts()["mujoco"] == "3.8.1"


def test_a_report_says_what_its_table_is_of() -> None:
    facts = {"assets": "libero", "mujoco": "3.3.2"}
    assert registry.describe(facts).startswith("LIBERO's own objects under MuJoCo 3.3.2: the world of")
    assert registry.describe({"benchmark": "not installed here"}) == ""
