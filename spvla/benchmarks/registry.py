"""Benchmarks by the names of their suites. One is a class of the `Benchmark` protocol and a line in BENCHMARKS.

Nothing heavy is imported until a world is opened, so commands check the names of suites here.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from spvla.errors import UserError
from spvla.types import Benchmark, Env

BENCHMARKS = {
    "libero": "spvla.benchmarks.libero.benchmark:Libero",
    "libero_pro": "spvla.benchmarks.libero_pro.benchmark:LiberoPro",
}
OLDEST = "libero"  # ledgers that name no benchmark are of this one


@dataclass(frozen=True, kw_only=True)
class BenchmarkFlags:
    """What a command's flags say about the worlds that it plays in."""

    libero_assets: Path | None = None
    any_mujoco: bool = False


class BenchmarkClass(Protocol):
    """What a line in BENCHMARKS names."""

    suites: tuple[str, ...]
    variants: Mapping[tuple[str, str], str]  # (a suite, possibly another benchmark's; what is changed) -> suite

    @staticmethod
    def describe(facts: Mapping[str, str]) -> str: ...

    def __call__(self, flags: BenchmarkFlags) -> Benchmark:
        """Raises UserError where this machine lacks what the benchmark is made of."""


def find(task_suite_name: str, flags: BenchmarkFlags) -> Benchmark:
    """The benchmark that has all of these suites, whose names are separated by commas. Raises UserError."""
    wanted = task_suite_name.split(",")
    every = {suite: name for name in BENCHMARKS for suite in load(name).suites}
    for suite in wanted:
        if suite not in every:
            raise UserError(
                f"--task_suite_name {suite}", expected=f"one of {', '.join(every)}", remedy="Correct the name."
            )
    if len({every[suite] for suite in wanted}) > 1:
        raise UserError(
            f"--task_suite_name {task_suite_name}",
            expected="suites of one benchmark",
            remedy="Evaluate each benchmark by itself, in a --local_log_dir of its own.",
        )
    return load(every[wanted[0]])(flags)


def open_env(suite: str, task: int, **flags: Any) -> Env:
    """A task's world: `reset(init_state)`, then `image()`, `proprio()` and `step(action)` until that says True.

    flags: those of `BenchmarkFlags`, such as libero_assets=Path("primitives"). The caller closes it. Raises UserError.
    """
    benchmark = find(suite, BenchmarkFlags(**flags))
    if not 0 <= task < (count := len(benchmark.instructions(suite))):
        raise UserError(f"task {task} of {suite}", expected=f"0 to {count - 1}", remedy="Correct the number.")
    benchmark.require([(suite, task)])
    return benchmark.open_env(suite, task)


def perturbed(task_suite_name: str, perturb: str) -> str:
    """("libero_object,libero_goal", "object,position") -> the four suites that change those so. Raises UserError."""
    variants = {asked: suite for name in BENCHMARKS for asked, suite in load(name).variants.items()}
    wanted = [(suite, how) for suite in task_suite_name.split(",") for how in perturb.split(",")]
    for suite, how in wanted:
        if (suite, how) not in variants:
            there = [other for base, other in variants if base == suite]
            raise UserError(
                f"--perturb {how} of {suite}",
                expected=f"one of {', '.join(there) or '(none)'}, which it has in LIBERO-PRO's package",
                remedy="Correct --perturb or --task_suite_name.",
            )
    return ",".join(variants[asked] for asked in wanted)


def load(name: str) -> BenchmarkClass:
    module, cls = BENCHMARKS[name].split(":")
    return getattr(importlib.import_module(module), cls)


def benchmark_of(facts: Mapping[str, str]) -> str:
    """The name of the benchmark that a ledger's manifest is of."""
    return facts.get("benchmark", OLDEST)


def describe(facts: Mapping[str, str]) -> str:
    """What a table with these facts is of, in a sentence; nothing where the benchmark is not known here."""
    name = benchmark_of(facts)
    return load(name).describe(facts) if name in BENCHMARKS else ""
