"""Where a TFDS data set keeps what: found by reading its two JSON files, without TensorFlow.

DATA_ROOT/libero_10_no_noops/1.0.0/dataset_info.json     splits, and how many records each shard holds
                                   features.json         names, shapes and types
                                   liber_o10-train.tfrecord-00000-of-00032, ...   named after the builder, not us
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, NotRequired, Protocol, TypeVar

from annotated_types import Predicate
from typing_extensions import TypedDict

from spvla import reading
from spvla.errors import DatasetError
from spvla.files import safe_name
from spvla.reading import Count
from spvla.types import ACTION_DIM, CAMERA_SIZE, PROPRIO_DIM

SPLITS = ("train", "val")
FRAME_SHAPE = (CAMERA_SIZE, CAMERA_SIZE, 3)
FEATURES: dict[str, tuple[int, ...]] = {
    "steps/observation/image": FRAME_SHAPE,
    "steps/action": (ACTION_DIM,),
    "steps/language_instruction": (),
}
OPTIONAL: dict[str, tuple[int, ...]] = {  # what plain OpenVLA does not look at
    "steps/observation/wrist_image": FRAME_SHAPE,
    "steps/observation/state": (PROPRIO_DIM,),
    "steps/observation/joint_state": (7,),
}


class Part(Protocol):
    """What one task reads of a data set: a shard of TFDS files, a block of a LeRobotDataset."""

    @property
    def name(self) -> str:
        """Of the index's file, in part."""

    @property
    def split(self) -> str: ...

    def fingerprint(self) -> dict[str, Any]:
        """What can be had without reading, and changes when it is written again."""

    def content_digest(self) -> str:
        """sha256 of what it is read from."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One TFRecord file; a record is an episode."""

    path: Path
    split: str
    records: int  # as dataset_info.json has it

    @property
    def name(self) -> str:
        return self.path.name

    def fingerprint(self) -> dict[str, Any]:
        stat = self.path.stat()
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "records": self.records}

    def content_digest(self) -> str:
        """sha256 of the file."""
        with self.path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()


P = TypeVar("P", bound=Part)


@dataclass(frozen=True, kw_only=True)
class Layout(Generic[P]):
    name: str  # of the folder; OpenVLA's users say this, and statistics are stored under it
    folder: Path  # the version's
    shards: tuple[P, ...]  # the train split's first, each split in order


class Split(TypedDict):
    """Of dataset_info.json; TFDS writes numbers as texts of digits."""

    name: str
    shardLengths: NotRequired[list[Annotated[str, Predicate(str.isdecimal)] | Count]]


class Info(TypedDict, total=False):
    """dataset_info.json, as far as it is read."""

    fileFormat: str
    splits: list[Split]


def find(data_root_dir: Path, dataset_name: str) -> Layout[Shard]:
    """The newest version of a data set, its features and shards checked. Raises DatasetError."""
    folder = newest_version(data_root_dir, dataset_name)
    check_features(folder)
    info = read_json(folder / "dataset_info.json", Info)
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise DatasetError(
            f"{folder} holds {info['fileFormat']} files", expected="tfrecord", remedy="Convert it with tfds."
        )
    sizes = {s["name"]: [int(n) for n in s.get("shardLengths", ())] for s in info.get("splits", ())}
    shards = tuple(shard for split in SPLITS for shard in shards_of(folder, split, sizes.get(split, [])))
    if not any(s.records for s in shards if s.split == "train"):
        raise DatasetError(
            f"{folder} has no episodes in its train split",
            expected="at least one",
            remedy="Collect demonstrations again (spvla collect), or download the data set again.",
        )
    return Layout(name=dataset_name, folder=folder, shards=shards)


def newest_version(data_root_dir: Path, dataset_name: str) -> Path:
    """DATA_ROOT/NAME/1.0.0, or DATA_ROOT/NAME itself if it holds the files."""
    folder = data_root_dir / safe_name(dataset_name, what="--dataset_name")
    if not folder.is_dir():
        found = sorted(p.name for p in data_root_dir.glob("*/") if any(versions(p)))
        raise DatasetError(
            f"{data_root_dir} holds no data set {dataset_name}",
            expected=f"one of {', '.join(found)}" if found else "a TFDS data set in a folder of that name",
            remedy="Correct --dataset_name or --data_root_dir, or make one with spvla collect.",
        )
    if every := sorted(versions(folder), key=lambda p: [int(n) for n in p.name.split(".")]):
        return every[-1]
    if (folder / "dataset_info.json").exists():
        return folder
    raise DatasetError(
        f"{folder} has no version with a dataset_info.json",
        expected=f"{folder}/1.0.0/dataset_info.json",
        remedy="Download it again, whole, or make it again.",
    )


def versions(folder: Path) -> Iterator[Path]:
    found = (p.parent for p in folder.glob("*/dataset_info.json"))
    return (p for p in found if re.fullmatch(r"\d+\.\d+\.\d+", p.name))


def check_features(folder: Path) -> None:
    """Names and shapes as in the LIBERO data sets that OpenVLA trains on; wrist images and states may be missing."""
    try:
        found = dict(flatten(read_json(folder / "features.json")))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as e:
        if isinstance(e, DatasetError):
            raise
        raise DatasetError(
            f"{folder}/features.json is damaged ({type(e).__name__}: {e})",
            expected="features as TFDS describes them",
            remedy="Download it again, whole, or make it again.",
        ) from e
    if missing := [name for name in FEATURES if name not in found]:
        raise DatasetError(
            f"{folder}/features.json lacks {', '.join(missing)} (it has {', '.join(sorted(found))})",
            expected="at least image, action and language_instruction, as in OpenVLA's modified_libero_rlds",
            remedy="Write the data set in that form, or give another --dataset_name.",
        )
    for name, shape in (FEATURES | OPTIONAL).items():
        if found.get(name, shape) != shape:
            raise DatasetError(
                f"{folder}/features.json says that {name} has shape {found[name]}",
                expected=f"{shape}",
                remedy="Make the data set again with frames of 256 x 256 and actions of 7 dimensions.",
            )


def flatten(feature: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """("steps/action", (7,)), ... of a features.json; an unknown dimension is -1."""
    if "sequence" in feature:
        yield from flatten(feature["sequence"]["feature"], prefix)
    elif "featuresDict" in feature:
        for name, inner in feature["featuresDict"]["features"].items():
            yield from flatten(inner, f"{prefix}/{name}" if prefix else name)
    else:
        kind: dict[str, Any] = next((feature[k] for k in ("tensor", "image", "text") if k in feature), {})
        yield prefix, tuple(int(n) for n in kind.get("shape", {}).get("dimensions", ()))


def shards_of(folder: Path, split: str, sizes: list[int]) -> Iterator[Shard]:
    for i, records in enumerate(sizes):
        suffix = f"-{split}.tfrecord-{i:05d}-of-{len(sizes):05d}"
        fitting = sorted(folder.glob(f"*{suffix}"))
        if len(fitting) != 1:
            raise DatasetError(
                f"{folder} has {len(fitting)} files *{suffix}",
                expected=f"one for each of the {len(sizes)} shards that dataset_info.json names",
                remedy="Download the data set again, whole.",
            )
        yield Shard(path=fitting[0], split=split, records=records)


def read_json(path: Path, form: Any = dict[str, Any]) -> Any:
    return reading.read_json(path, form, remedy="Download it again, whole, or make it again.", error=DatasetError)
