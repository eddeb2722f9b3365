"""LIBERO (arxiv.org/abs/2306.03310) behind the `Benchmark` seam. Importing it imports no simulator."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

from spvla.benchmarks.libero import assets, versions
from spvla.benchmarks.libero.genuine import TASKS_DIGEST
from spvla.benchmarks.libero.init_states import num_init_states
from spvla.benchmarks.libero.suites import MAX_STEPS, SUITES, task_info, tasks
from spvla.benchmarks.registry import BenchmarkFlags
from spvla.render.context import draw_on_one_core, renderer_name, try_drawing
from spvla.types import Env

PACKAGES = {"robosuite": "robosuite", "libero": "hf-libero"}  # name in facts -> distribution


class Libero:
    """Its five suites, on one set of assets."""

    suites = SUITES
    variants: ClassVar[dict[tuple[str, str], str]] = {}

    def __init__(self, flags: BenchmarkFlags) -> None:
        self.flags = flags

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as its flags: every process finds its assets by itself, and facts tell whether they are the same."""
        return Libero, (replace(self.flags, libero_assets=assets.for_other_processes(self.flags.libero_assets)),)

    @cached_property
    def asset_set(self) -> assets.AssetSet:
        return assets.resolve(self.flags.libero_assets)

    def instructions(self, suite: str) -> list[str]:
        return [task.instruction for task in tasks(suite)]

    def max_steps(self, suite: str) -> int:
        return MAX_STEPS[suite]

    def trained_on(self, suite: str) -> str:
        return suite

    def num_init_states(self, suite: str, task: int) -> int:
        return num_init_states(suite, task)

    def require(self, wanted: Sequence[tuple[str, int]]) -> None:
        versions.require_mujoco(any_version=self.flags.any_mujoco)
        self.asset_set.require(task_info(*task) for task in wanted)

    def require_drawing(self) -> None:
        try_drawing()

    def facts(self) -> dict[str, str]:
        return {
            "assets": self.asset_set.name,
            "assets_digest": self.asset_set.digest,
            "tasks_digest": TASKS_DIGEST,
            "mujoco": versions.installed_mujoco(),
            **{name: importlib.metadata.version(package) for name, package in PACKAGES.items()},
        }

    @staticmethod
    def describe(facts: Mapping[str, str]) -> str:
        return versions.world(facts["mujoco"], facts["assets"])

    def measure(self) -> dict[str, str]:
        return {"renderer": renderer_name()}

    def open_env(self, suite: str, task: int, *, spare_gpu: bool = False) -> Env:
        from spvla.benchmarks.libero.env import LiberoEnv

        draw_on_one_core()
        return LiberoEnv(suite, task, self.asset_set, spare_gpu=spare_gpu)
