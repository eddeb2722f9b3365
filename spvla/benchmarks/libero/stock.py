"""The only door to LIBERO and robosuite: whatever the other modules use of them, they import from here.

Left alone, importing them calls input() and writes ~/.libero, opens a log file in /tmp, and prints warnings of
robosuite's and gym's. Through this door it is silent, and only the cache folder is written to.
"""

import contextlib
import ctypes
import gc
import io
import logging
import os
import pdb
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

import spvla.compiler  # noqa: F401  before robosuite, which compiles with numba
from spvla.benchmarks.libero.suites import load_file, package
from spvla.errors import InfrastructureError
from spvla.files import cache_dir, write_text


def _configure_libero() -> None:
    """Writes the file that LIBERO would otherwise ask for."""
    root, folder = package("libero") / "libero", cache_dir() / "libero-config"
    places = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": root / "assets",
    }
    text = "".join(f"{name}: {place}\n" for name, place in places.items())
    file = folder / "config.yaml"
    if not file.exists() or file.read_text() != text:
        write_text(file, text)
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)


def _configure_robosuite() -> None:
    """Puts robosuite's settings in place before robosuite reads them: no log file, no advice."""
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    if "robosuite" in sys.modules:
        return
    macros = load_file("robosuite.macros", package("robosuite") / "macros.py")
    macros.FILE_LOGGING_LEVEL = None
    sys.modules["robosuite.macros"] = macros


def cache_files(size_bytes: int) -> None:
    """MuJoCo keeps so much of a model's meshes and pictures for the next one: 300 to 400 MB of a LIBERO task's, which
    only a hard reset would read again.

    Never less than before, once anything is built: 3.3.2 crashes where it empties a cache that has been read from. The
    symbols are exported, but not Python's; a MuJoCo without them keeps its cache.
    """
    library = ctypes.CDLL(str(next(Path(mujoco.__file__).parent.glob("libmujoco.*"))))
    with contextlib.suppress(AttributeError):
        library.mj_globalCache.restype = ctypes.c_void_p
        library.mj_setCacheSize(ctypes.c_void_p(library.mj_globalCache()), ctypes.c_size_t(size_bytes))


_configure_libero()
_configure_robosuite()
cache_files(0)
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    import libero.libero
    from libero.libero.envs import TASK_MAPPING
    from libero.libero.envs.base_object import OBJECTS_DICT, VISUAL_CHANGE_OBJECTS_DICT
    from libero.libero.envs.bddl_utils import get_problem_info
    from robosuite import load_controller_config
    from robosuite.environments.base import MujocoEnv
    from robosuite.utils.control_utils import (
        nullspace_torques,
        opspace_matrices,
        orientation_error,
        set_goal_orientation,
    )
    from robosuite.utils.errors import RandomizationError
    from robosuite.utils.transform_utils import quat2axisangle

__all__ = [
    "MujocoEnv",
    "RandomizationError",
    "nullspace_torques",
    "opspace_matrices",
    "orientation_error",
    "quat2axisangle",
    "set_goal_orientation",
]


def use_assets(folder: Path) -> None:
    """Objects built from here on are read from `folder`; LIBERO looks it up each time."""
    libero.libero._assets_path_cache = str(folder)


def add_objects(likes: Mapping[str, str]) -> None:
    """Objects that LIBERO has not, each handled as one that it has (turned, opened, lit): its name -> LIBERO's name."""
    for name, like in likes.items():
        if name not in OBJECTS_DICT:
            OBJECTS_DICT[name] = _resembling(name, OBJECTS_DICT[like])
            if like in VISUAL_CHANGE_OBJECTS_DICT:
                VISUAL_CHANGE_OBJECTS_DICT[name] = OBJECTS_DICT[name]


def _resembling(name: str, like: type) -> type:
    def build(self: Any, name: str = name, obj_name: str = name, **joints: Any) -> None:
        like.__init__(self, name, obj_name, **joints)

    return type("".join(word.capitalize() for word in name.split("_")), (like,), {"__init__": build})


MUJOCO_CACHE = 500 * 2**20  # bytes: as MuJoCo has it, for comparison with LIBERO's own environment
MAX_RESETS = 100  # LIBERO itself would try for ever to place a scene's objects


@contextlib.contextmanager
def drawing_from(generator: np.random.RandomState) -> Iterator[None]:
    """LIBERO draws from numpy's global generator; within the block that is `generator`, afterwards it is untouched.

    Nor does LIBERO's sampler stop in a debugger within the block, as it does where it finds no room for an object.
    """
    outside, set_trace = np.random.get_state(), pdb.set_trace
    np.random.set_state(generator.get_state())
    pdb.set_trace = lambda *args, **kwargs: None
    try:
        yield
    finally:
        generator.set_state(np.random.get_state())
        np.random.set_state(outside)
        pdb.set_trace = set_trace


def build_problem(bddl_file: Path, assets: Path) -> MujocoEnv:
    """LIBERO's problem for a task, its objects read from the folder `assets`, without cameras or a renderer.

    Its `loaded_poses` are the model's body_pos (nbody, 3) and body_quat (nbody, 4) before furniture was placed.
    """
    use_assets(assets)
    kind = _remembering(TASK_MAPPING[get_problem_info(str(bddl_file))["problem_name"]])
    controller = load_controller_config(default_controller="OSC_POSE")
    with drawing_from(np.random.RandomState(0)):
        for _ in range(MAX_RESETS):
            with contextlib.suppress(RandomizationError):
                problem = kind(
                    str(bddl_file),
                    robots=["Panda"],
                    controller_configs=controller,
                    initialization_noise=None,
                    has_renderer=False,
                    has_offscreen_renderer=False,
                    use_camera_obs=False,
                )
                _free_leftovers()
                return problem
    raise InfrastructureError(f"{bddl_file}: no room for its objects in {MAX_RESETS} tries")


def _remembering(kind: type[MujocoEnv]) -> type[MujocoEnv]:
    def initialize_sim(problem: MujocoEnv, xml_string: str | None = None) -> None:
        kind._initialize_sim(problem, xml_string)
        problem.loaded_poses = problem.sim.model.body_pos.copy(), problem.sim.model.body_quat.copy()

    return type(kind.__name__, (kind,), {"_initialize_sim": initialize_sim})  # LIBERO looks at the name


def _free_leftovers() -> None:
    """Gives back what building leaves behind: 430 MB, much with thirty environments on a node."""
    mujoco.MjModel.from_xml_string("<mujoco/>")  # MuJoCo keeps the last model it parsed; now it keeps this one
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
