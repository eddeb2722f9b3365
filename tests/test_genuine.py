"""Another benchmark's package of LIBERO's name is found out by what it holds, before any work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spvla.benchmarks.libero import suites
from spvla.benchmarks.libero.genuine import SUITE_SIZES, TASKS_DIGEST, require_libero
from spvla.errors import UserError

LOOKS_ASSETS_UP = "def get_assets_path():\n    return 'assets'\n"


@pytest.fixture
def task_map() -> dict[str, list[str]]:
    return {suite: [task.name for task in suites.tasks(suite)] for suite in suites.SUITES}


def libero_copy(folder: Path, task_map: dict[str, list[str]], code: str = LOOKS_ASSETS_UP) -> Path:
    """A package `libero` in `folder` with LIBERO's files of tasks, links to the installed ones; its libero/libero."""
    root, installed = folder / "libero/libero", suites.package("libero") / "libero"
    (root / "benchmark").mkdir(parents=True)
    (root.parent / "__init__.py").touch()
    (root / "__init__.py").write_text(code)
    (root / "benchmark/libero_suite_task_map.py").write_text(f"libero_task_map = {task_map!r}\n")
    for kind in ("bddl_files", "init_files"):
        for suite in task_map:
            (root / kind / suite).mkdir(parents=True)
            for file in (installed / kind / suite).glob("*"):
                (root / kind / suite / file.name).symlink_to(file)
    return root


def altered(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def test_the_installed_package_is_liberos_and_so_is_a_copy_of_its_files(tmp_path: Path, task_map: dict) -> None:
    assert {suite: len(names) for suite, names in task_map.items()} == SUITE_SIZES
    require_libero(libero_copy(tmp_path, task_map), task_map)
    assert len(TASKS_DIGEST) == 64


def test_more_tasks_under_a_suites_name_are_refused_with_their_number(tmp_path: Path, task_map: dict) -> None:
    plus = task_map | {"libero_object": [f"{name}_{i}" for name in task_map["libero_object"] for i in range(250)]}
    with pytest.raises(UserError, match="its libero_object has 2500 tasks instead of 10 .*LIBERO-plus"):
        require_libero(libero_copy(tmp_path, task_map), plus)


def test_suites_beside_liberos_are_refused_by_name(tmp_path: Path, task_map: dict) -> None:
    pro = task_map | {"libero_goal_temp": task_map["libero_goal"]}
    with pytest.raises(UserError, match="such as libero_goal_temp .*LIBERO-PRO"):
        require_libero(libero_copy(tmp_path, task_map), pro)


def test_code_that_would_not_read_the_assets_it_is_given_is_refused(tmp_path: Path, task_map: dict) -> None:
    root = libero_copy(tmp_path, task_map, code="def get_libero_path(query_key):\n    return ''\n")
    with pytest.raises(UserError, match="can read objects from its own folder only"):
        require_libero(root, task_map)
    (root / "__init__.py").unlink()
    with pytest.raises(UserError, match="can read objects from its own folder only"):
        require_libero(root, task_map)


def test_two_tasks_in_another_order_are_another_suite(tmp_path: Path, task_map: dict) -> None:
    first, second, *others = task_map["libero_spatial"]
    swapped = task_map | {"libero_spatial": [second, first, *others]}
    with pytest.raises(UserError, match="of its libero_spatial are not LIBERO's"):
        require_libero(libero_copy(tmp_path, task_map), swapped)


@pytest.mark.parametrize(("kind", "ending"), [("bddl_files", "bddl"), ("init_files", "pruned_init")])
def test_one_altered_or_missing_file_is_found(tmp_path: Path, task_map: dict, kind: str, ending: str) -> None:
    root = libero_copy(tmp_path, task_map)
    file = root / kind / "libero_10" / f"{task_map['libero_10'][3]}.{ending}"
    altered(file, file.read_bytes() + b" ")
    with pytest.raises(UserError, match="of its libero_10 are not LIBERO's"):
        require_libero(root, task_map)
    file.unlink()
    with pytest.raises(UserError, match=f"{kind}/libero_10/.*{ending} cannot be read"):
        require_libero(root, task_map)


def refused(tmp_path: Path) -> str:
    """What `spvla evaluate` says with the packages of a folder first on Python's path."""
    flags = ["--pretrained_checkpoint", "tiny", "--task_suite_name", "libero_object"]
    done = subprocess.run(
        [sys.executable, "-m", "spvla.cli", "evaluate", *flags, "--local_log_dir", tmp_path / "run"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), *sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr


def test_a_command_ends_with_one_line_before_any_work(tmp_path: Path, task_map: dict) -> None:
    libero_copy(tmp_path, task_map | {"libero_goal": task_map["libero_goal"] * 3})
    said = refused(tmp_path)
    assert f"the package in {tmp_path}/libero is not LIBERO as published" in said and "hf-libero==0.1.4" in said


def test_a_folder_that_only_has_the_name_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "libero").mkdir()
    (tmp_path / "libero/__init__.py").touch()
    assert f"{tmp_path}/libero is a package `libero` without LIBERO's list of tasks" in refused(tmp_path)
