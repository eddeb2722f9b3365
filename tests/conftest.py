"""Shared fixtures: one Ray for all tests, LIBERO's own objects, the golden files where they are at hand."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from spvla.benchmarks.libero.assets import AssetSet

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LIBERO_ASSETS", "primitives")  # they load in a third of the time; `real_assets` are the others
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SHARED = Path(os.environ.get("SPVLA_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """tests/sim draws in this process, where TensorFlow must not be: it runs only when it is named."""
    named = any("sim" in Path(argument.split("::")[0]).parts for argument in config.args)
    return True if collection_path.name == "sim" and not named else None


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference outputs of the original code."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"needs the original code's outputs in {SHARED}/golden (SPVLA_SHARED names the parent)")
    return SHARED / "golden"


@pytest.fixture(scope="session")
def real_assets() -> "AssetSet":
    """LIBERO's own objects, from the packages of the extra `assets`."""
    from spvla.benchmarks.libero import assets

    if (folder := assets.installed()) is None:
        pytest.skip("needs LIBERO's objects: `make setup` without ASSETS=primitives, or the extra `assets`")
    return assets.resolve(folder)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with four logical CPUs, started once for all tests that ask for it."""
    from spvla.cluster.connect import connection

    with connection(num_cpus=4):
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A sum's order, and so its last bit, follows the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
