"""Which set of LIBERO assets (meshes, textures, MJCF) a simulation is built from.

In order: a folder given by flag, the folder in LIBERO_ASSETS, LIBERO's own where its package keeps or downloads them,
else the embedded primitives, written once into the cache folder. Results carry the set's name and digest, since a
success rate means nothing without them.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from spvla.benchmarks.libero import primitives
from spvla.benchmarks.libero.suites import TaskInfo
from spvla.errors import UserError
from spvla.files import cache_dir, create_once

# Every LIBERO scene reads from these.
FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")


@dataclass(frozen=True, kw_only=True)
class AssetSet:
    """A folder of assets, by name and content."""

    name: str  # "primitives", "libero", or the given folder's own name
    path: Path
    digest: str  # sha256 of every file's path and bytes

    def require(self, tasks: Iterable[TaskInfo]) -> None:
        """Raises UserError where a task's scene needs a model that is not among these."""
        there = {Path(name).stem for _, _, names in os.walk(self.path, followlinks=True) for name in names}
        for task in tasks:
            if missing := task.models - there:
                names = ", ".join(sorted(missing))
                raise UserError(
                    f"{task.suite} task {task.id} needs {names}, which the {self.name} assets lack",
                    expected="assets with every model of the task",
                    remedy="Give LIBERO's own with --libero_assets, or choose other --tasks.",
                )


def resolve(flag: Path | None = None) -> AssetSet:
    """The asset set in use. Raises UserError when a folder was asked for by name and is no asset set."""
    if flag is not None:
        return _given(flag, asked="--libero_assets")
    if variable := os.environ.get("LIBERO_ASSETS"):
        return _given(Path(variable), asked="LIBERO_ASSETS")
    for own in _libero_places():
        if not _missing(own):
            return AssetSet(name="libero", path=own, digest=_digest(own))
    return _primitives()


def _given(folder: Path, *, asked: str) -> AssetSet:
    folder = folder.expanduser().resolve()
    if missing := _missing(folder):
        raise UserError(
            f"{asked} {folder} has no {missing[0]}/",
            expected=f"a folder of LIBERO's assets, with {', '.join(FOLDERS)}",
            remedy="Correct it, or leave it out to use the embedded primitives.",
        )
    return AssetSet(name=folder.name, path=folder, digest=_digest(folder))


def _missing(folder: Path) -> list[str]:
    return [name for name in FOLDERS if not (folder / name).is_dir()]


def _libero_places() -> list[Path]:
    """Where the libero package looks for its assets: beside its own code, then in its download folder."""
    places = [Path.home() / ".cache/libero/assets"]
    package = importlib.util.find_spec("libero")
    if package is not None and package.submodule_search_locations:
        places.insert(0, Path(package.submodule_search_locations[0]) / "libero/assets")
    return places


def _primitives() -> AssetSet:
    folder = create_once(cache_dir() / "assets" / f"primitives-{primitives.DIGEST[:16]}", primitives.write)
    return AssetSet(name="primitives", path=folder, digest=primitives.DIGEST)


def _digest(folder: Path) -> str:
    """sha256 over sorted relative paths and contents, links followed; a tenth of a second for LIBERO's own set."""
    total = hashlib.sha256()
    found = (Path(at) / name for at, _, names in os.walk(folder, followlinks=True) for name in names)
    for file in sorted(f for f in found if f.is_file()):
        total.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()
