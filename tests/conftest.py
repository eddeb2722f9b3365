"""Shared fixtures: one Ray for all tests, the golden files and real assets where they are at hand."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("MUJOCO_GL", "egl")
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
def real_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of LIBERO's real assets."""
    if given := os.environ.get("LIBERO_ASSETS"):
        return Path(given)
    archive = SHARED / "libero_assets.tar.xz"
    if not archive.exists():
        pytest.skip(f"needs LIBERO's assets: set LIBERO_ASSETS, or put {archive.name} into {SHARED}")
    folder = tmp_path_factory.mktemp("assets")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "libero_assets"


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
