"""LIBERO's suites and tasks, read from its files without importing it (which takes a second and 150 MB)."""

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from spvla.benchmarks.libero.genuine import require_libero
from spvla.errors import UserError

# Steps a trial may take in each suite, after the settling steps (OpenVLA's evaluation protocol).
MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
SUITES = tuple(MAX_STEPS)


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """One of a suite's tasks, by LIBERO's own number."""

    suite: str
    id: int
    name: str
    instruction: str
    max_steps: int
    folder: Path  # with the benchmark's bddl_files and init_files

    @property
    def bddl_file(self) -> Path:
        return self.folder / "bddl_files" / self.suite / f"{self.name}.bddl"

    @property
    def init_file(self) -> Path:
        return self.folder / "init_files" / self.suite / f"{self.name}.pruned_init"

    @property
    def models(self) -> set[str]:
        """The scene's objects and furniture, as an asset set calls them; tables and floors belong to no one task."""
        lists = re.search(r"\(:fixtures(.*?)\)\s*\(:objects(.*?)\)", self.bddl_file.read_text(), re.DOTALL)
        assert lists is not None, self.bddl_file
        kinds = re.findall(r"- (\w+)", lists[1] + lists[2])
        return {kind for kind in kinds if not kind.endswith(("table", "floor"))}


def tasks(suite: str) -> list[TaskInfo]:
    """Every task of a suite, in LIBERO's order."""
    if suite not in SUITES:
        raise UserError(f"suite {suite}", expected=f"one of {', '.join(SUITES)}", remedy="Correct the name.")
    same: dict[str, Any] = {"suite": suite, "max_steps": MAX_STEPS[suite], "folder": package("libero") / "libero"}
    return [
        TaskInfo(id=i, name=name, instruction=_instruction(name), **same) for i, name in enumerate(_task_map()[suite])
    ]


def task_info(suite: str, task: int) -> TaskInfo:
    found = tasks(suite)
    if not 0 <= task < len(found):
        raise UserError(f"task {task} of {suite}", expected=f"0 to {len(found) - 1}", remedy="Correct the number.")
    return found[task]


def package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"no package {name}", expected="hf-libero and robosuite 1.4.0", remedy="Run `make setup`.")
    return Path(found.submodule_search_locations[0])


def load_file(name: str, path: Path) -> ModuleType:
    """Runs one file as a module, without the package around it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _task_map() -> dict[str, list[str]]:
    """Suite -> names of its tasks. Raises UserError where the installed `libero` is not LIBERO."""
    root = package("libero") / "libero"
    try:
        task_map = load_file("libero_suite_task_map", root / "benchmark/libero_suite_task_map.py").libero_task_map
    except (OSError, AttributeError) as e:
        raise UserError(
            f"{root.parent} is a package `libero` without LIBERO's list of tasks",
            expected="hf-libero 0.1.4, the only `libero` on Python's path",
            remedy="Rename or remove it, and run `make setup`.",
        ) from e
    require_libero(root, task_map)
    return task_map


def bddl_language(file: Path) -> str:
    """The wording in a BDDL file, which for LIBERO's own tasks is not the one that policies are given."""
    found = re.search(r"\(:language ([^)]*)\)", file.read_text())
    assert found is not None, file
    return found[1].strip()


def _instruction(name: str) -> str:
    """LIBERO's rule: the file's name, after its scene where it has one."""
    words = name.split("_")
    scene = [i for i, word in enumerate(words) if word.startswith("SCENE")]
    return " ".join(words[scene[0] + 1 :] if scene else words)
