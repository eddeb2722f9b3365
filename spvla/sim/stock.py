"""The only door to LIBERO and robosuite: silent, no question asked, nothing written but into the cache folder.

Left alone, importing libero calls input() and writes ~/.libero, robosuite opens a log file in /tmp and prints three
warnings, and gym prints one more. Everything here happens when `load` is called, not on import.
"""

import contextlib
import importlib.util
import io
import logging
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from spvla.files import cache_dir, write_text


@cache
def package() -> Path:
    """The folder libero/libero of the installed package, found without importing it."""
    found = importlib.util.find_spec("libero")
    assert found is not None and found.submodule_search_locations, "hf-libero is a requirement"
    return Path(found.submodule_search_locations[0]) / "libero"


@cache
def task_names() -> dict[str, tuple[str, ...]]:
    """suite -> its tasks' names in LIBERO's order 0, read from LIBERO's own table without importing torch."""
    table = _load_file("libero_suite_task_map", package() / "benchmark/libero_suite_task_map.py")
    return {suite: tuple(names) for suite, names in table.libero_task_map.items()}


@cache
def load() -> ModuleType:
    """libero.libero.envs, ready to build problems."""
    os.environ["LIBERO_CONFIG_PATH"] = str(_config_folder())
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        _without_log_file()
        import libero.libero.envs as envs
    return envs


def use_assets(folder: Path) -> None:
    """Every object built from here on reads its MJCF from `folder`."""
    load()
    import libero.libero as root

    root._assets_path_cache = str(folder)


def _config_folder() -> Path:
    folder = cache_dir() / "libero-config"
    places = {
        "benchmark_root": ".",
        "bddl_files": "bddl_files",
        "init_states": "init_files",
        "datasets": "../datasets",
        "assets": "assets",
    }
    text = "".join(f"{name}: {package() / place}\n" for name, place in places.items())
    file = folder / "config.yaml"
    if not file.exists() or file.read_text() != text:
        write_text(file, text)
    return folder


def _without_log_file() -> None:
    """Loads robosuite's settings ahead of robosuite itself, which reads them once: no log file in /tmp."""
    if "robosuite" in sys.modules:
        return
    found = importlib.util.find_spec("robosuite")
    assert found is not None and found.submodule_search_locations, "robosuite is a requirement"
    macros = _load_file("robosuite.macros", Path(found.submodule_search_locations[0]) / "macros.py")
    macros.FILE_LOGGING_LEVEL = None
    sys.modules["robosuite.macros"] = macros


def _load_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
