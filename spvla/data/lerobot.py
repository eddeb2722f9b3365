"""A LeRobotDataset v3 of LIBERO -> episodes.

DATA_ROOT/NAME/meta/info.json                                 version, features, splits, where files lie
               meta/tasks.parquet                             task_index -> instruction
               meta/episodes/chunk-000/file-000.parquet       a row an episode: length, its data file, its videos
               data/chunk-000/file-000.parquet                a row a frame: state, action, perhaps pictures
               videos/KEY/chunk-000/file-000.mp4              pictures of many episodes, one after another

Actions are LIBERO's own (gripper -1 open, +1 closed) and pictures are rotated by 180 degrees, as in the field's
converted LIBERO sets and in RLDS. Pictures from a video, or stored as PNG, become JPEGs (q95, 4:2:0); JPEGs stay as
they are. Videos are decoded by ffmpeg, which imageio brings.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from spvla.data.layout import FRAME_SHAPE, Layout
from spvla.errors import DatasetError
from spvla.policies.openvla.actions import GRIPPER
from spvla.policies.openvla.images import encode_jpeg
from spvla.types import ACTION_DIM, CAMERA_SIZE, PROPRIO_DIM, Episode

INFO = Path("meta/info.json")
VERSION = "v3."
CAMERAS = (  # names that the field gives them
    ("observation.images.image", "observation.images.agentview", "observation.images.front", "observation.image"),
    ("observation.images.image2", "observation.images.wrist_image", "observation.images.wrist"),
)
STATE, JOINTS, ACTION = "observation.state", "observation.joint_state", "action"
# How ffmpeg turns RGB to YCbCr and back: its default, quicker way costs another level of 255 on average.
SCALING = ["-sws_flags", "lanczos+accurate_rnd+full_chroma_int+full_chroma_inp"]
BLOCK_EPISODES = 16  # read by one task


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some consecutive episodes that share their files: what a shard is in RLDS."""

    root: Path
    number: int
    split: str
    episodes: tuple[Mapping[str, Any], ...] = field(repr=False)  # their rows of meta/episodes
    info: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"

    def fingerprint(self) -> dict[str, Any]:
        """What can be had without reading the files, and changes when one is written again."""
        stats = [path.stat() for path in self._files()]
        return {"files": [[s.st_size, s.st_mtime_ns] for s in stats], "episodes": self._range()}

    def content_digest(self) -> str:
        """sha256 over the files and which episodes of them."""
        digest = hashlib.sha256(repr(self._range()).encode())
        for path in self._files():
            with path.open("rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
        return digest.hexdigest()

    def read(self, skipped: list[str] | None) -> Iterator[Episode]:
        """Raises DatasetError, which names the episode; with a list `skipped`, its message joins that list instead."""
        tasks = read_tasks(self.root)
        for row in self.episodes:
            try:
                yield read_episode(self.root, self.info, row, tasks)
            except DatasetError as e:
                message = f"{self.root.name} episode {row['episode_index']}: {e.got}"
                if skipped is None:
                    remedy = "Download the data set again, or leave such episodes out with --skip_corrupt True."
                    raise DatasetError(message, expected=e.expected, remedy=remedy) from e
                skipped.append(message)

    def _range(self) -> list[int]:
        return [int(self.episodes[0]["episode_index"]), int(self.episodes[-1]["episode_index"])]

    def _files(self) -> list[Path]:
        return [self.root / INFO, *files_of(self.root, self.info, self.episodes[0]).values()]


def is_lerobot(folder: Path) -> bool:
    return (folder / INFO).is_file()


def find(folder: Path, name: str) -> Layout[Any]:
    """Its version, features and files checked, without reading a frame. Raises DatasetError."""
    info = read_info(folder)
    rows = read_rows(folder, info)
    blocks: list[Any] = []
    for split, chosen in splits_of(info, rows):
        for _, same in groupby(chosen, key=lambda row: list(files_of(folder, info, row).values())):
            group = list(same)
            for first in range(0, len(group), BLOCK_EPISODES):
                episodes = tuple(group[first : first + BLOCK_EPISODES])
                blocks.append(Block(root=folder, number=len(blocks), split=split, episodes=episodes, info=info))
    require_gripper(folder)
    for block in blocks:
        require_files(files_of(folder, info, block.episodes[0]).values())
    if not blocks or blocks[0].split != "train":
        raise DatasetError(f"{folder} has no episodes", expected="at least one", remedy="Download it again, whole.")
    return Layout(name=name, folder=folder, shards=tuple(blocks))


def read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    try:
        info = json.loads(path.read_text())
        version, features = str(info["codebase_version"]), dict(info["features"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise _damaged(path, e) from e
    if not version.startswith(VERSION):
        raise DatasetError(
            f"{path} has version {version}",
            expected="a LeRobotDataset v3",
            remedy="Convert it with LeRobot's convert_dataset_v21_to_v30.",
        )
    if not _key(features, CAMERAS[0]):
        pictures = [name for name, f in features.items() if f.get("dtype") in ("image", "video")]
        raise DatasetError(
            f"{path} has pictures {', '.join(pictures) or 'of no camera'}",
            expected=f"one of {', '.join(CAMERAS[0])}",
            remedy="Rename the feature of the main camera.",
        )
    for name, width, needed in ((ACTION, ACTION_DIM, True), (STATE, PROPRIO_DIM, False), (JOINTS, 7, False)):
        found = list(features[name]["shape"]) if name in features else None
        if found != [width] and (needed or found is not None):
            raise DatasetError(
                f"{path} says that {name} has shape {found}",
                expected=f"[{width}]",
                remedy="Use a data set of LIBERO: end-effector actions, and states of 8 numbers.",
            )
    return info


def read_rows(folder: Path, info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One of each episode, in order, without their statistics."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("meta/episodes/*/*.parquet")):
        try:
            names = [n for n in pq.read_schema(path).names if not n.startswith("stats/")]
            rows += pq.read_table(path, columns=names).to_pylist()
        except (OSError, ValueError) as e:
            raise _damaged(path, e) from e
    missing = {"episode_index", "length", "data/chunk_index", "data/file_index"} - set(rows[0] if rows else ())
    if missing or len(rows) != info.get("total_episodes", len(rows)):
        raise DatasetError(
            f"{folder}/meta/episodes holds {len(rows)} episodes" + (f" without {', '.join(missing)}" * bool(missing)),
            expected=f"{info.get('total_episodes')}, as info.json says, and where their files are",
            remedy="Download the data set again, whole.",
        )
    return sorted(rows, key=lambda row: row["episode_index"])


def splits_of(info: Mapping[str, Any], rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """("train", episodes), and ("val", episodes) where info.json names them."""
    ranges = {name: range(*map(int, str(text).split(":"))) for name, text in info.get("splits", {}).items()}
    val = ranges.get("val", ranges.get("validation", range(0)))
    yield "train", [row for row in rows if row["episode_index"] not in val]
    yield "val", [row for row in rows if row["episode_index"] in val]


def files_of(folder: Path, info: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Path]:
    """{"data": its parquet file, camera's key: its video}, of one episode."""
    files = {"data": _place(info["data_path"], row, "data")}
    for key in camera_keys(info):
        if info["features"][key]["dtype"] == "video":
            files[key] = _place(info["video_path"], row, f"videos/{key}", video_key=key)
    return {name: inside(folder, path) for name, path in files.items()}


def inside(folder: Path, path: str) -> Path:
    """Raises DatasetError for a path that leads out of the data set."""
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise DatasetError(f"{folder / INFO} names {path}", expected="files inside it", remedy="Correct it.")
    return folder / path


def _place(pattern: str, row: Mapping[str, Any], prefix: str, **names: str) -> str:
    numbers = {name: int(row[f"{prefix}/{name}"]) for name in ("chunk_index", "file_index")}
    return pattern.format(**numbers, **names)


def require_files(paths: Iterable[Path]) -> None:
    for path in paths:
        if not path.is_file():
            raise DatasetError(
                f"{path} is missing", expected="every file that meta/episodes names", remedy="Download it again, whole."
            )


def camera_keys(info: Mapping[str, Any]) -> list[str]:
    """The main camera's key, and the wrist's if there is one."""
    return [key for names in CAMERAS if (key := _key(info["features"], names))]


def _key(features: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in features), None)


def require_gripper(folder: Path) -> None:
    """Raises DatasetError where the statistics show that no action opens the gripper as LIBERO does."""
    try:
        lowest = json.loads((folder / "meta/stats.json").read_text())[ACTION]["min"][GRIPPER]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return  # LeRobot can do without
    if lowest >= 0:
        raise DatasetError(
            f"{folder} has gripper actions from {lowest} on",
            expected="LIBERO's own: -1 open, +1 closed",
            remedy="Convert them, or use the data set they were made from.",
        )


def read_tasks(folder: Path) -> dict[int, str]:
    path = folder / "meta/tasks.parquet"
    try:
        table = pq.read_table(path)
        (text,) = (name for name in table.column_names if name != "task_index")
        return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))
    except (OSError, ValueError, KeyError) as e:
        raise _damaged(path, e) from e


def read_episode(folder: Path, info: Mapping[str, Any], row: Mapping[str, Any], tasks: Mapping[int, str]) -> Episode:
    """Raises DatasetError saying what is wrong with it."""
    number, length = int(row["episode_index"]), int(row["length"])
    files = files_of(folder, info, row)
    try:
        table = pq.read_table(files["data"], filters=pc.field("episode_index") == number).sort_by("frame_index")
    except (OSError, ValueError) as e:
        raise _damaged(files["data"], e) from e
    check(length > 0 and table["frame_index"].to_pylist() == list(range(length)), f"{len(table)} rows", f"{length}")
    instruction = tasks.get(table["task_index"][0].as_py(), "")
    check(bool(instruction.strip()), "no task", "a sentence in meta/tasks.parquet")
    pictures = [
        from_video(files[key], row[f"videos/{key}/from_timestamp"], length, info["fps"])
        if key in files
        else [to_jpeg(cell["bytes"], step) for step, cell in enumerate(table[key].to_pylist())]
        for key in camera_keys(info)
    ]
    return Episode(
        images=pictures[0],
        wrist_images=pictures[1] if len(pictures) > 1 else [],
        states=rows_of(table, STATE, PROPRIO_DIM),
        joint_states=rows_of(table, JOINTS, 7),
        actions=rows_of(table, ACTION, ACTION_DIM),
        instruction=instruction,
        source=f"{folder.name}#episode_{number}",
    )


def rows_of(table: Any, name: str, width: int) -> np.ndarray:
    """(T, width) float32; (0, width) where the data set lacks it."""
    if name not in table.column_names:
        return np.zeros((0, width), np.float32)
    rows = np.array(table[name].to_pylist(), np.float32)
    check(rows.shape == (len(table), width), f"{name} of shape {rows.shape}", f"({len(table)}, {width})")
    check(bool(np.isfinite(rows).all()), f"{name} with NaN or infinity", "finite numbers")
    return rows


def from_video(path: Path, start_s: float, count: int, fps: float) -> list[bytes]:
    """`count` frames from `start_s` on, as JPEGs."""
    seek = ["-ss", f"{max(0.0, start_s - 0.5 / fps):.6f}"]  # half a frame earlier: times are rounded
    frames = imageio_ffmpeg.read_frames(
        str(path), input_params=seek, output_params=["-frames:v", str(count), "-fps_mode", "passthrough", *SCALING]
    )
    try:
        width, height = next(frames)["size"]
        check((height, width) == FRAME_SHAPE[:2], f"frames of {height} x {width}", f"{CAMERA_SIZE} x {CAMERA_SIZE}")
        jpegs = [encode_jpeg(np.frombuffer(data, np.uint8).reshape(FRAME_SHAPE)) for data in frames]
    except (OSError, RuntimeError, StopIteration) as e:
        raise _damaged(path, e) from e
    finally:
        frames.close()
    check(len(jpegs) == count, f"{path.name} shows {len(jpegs)} frames from {start_s:.2f} s on", f"{count}")
    return jpegs


def to_jpeg(data: bytes, step: int) -> bytes:
    """A stored picture: a JPEG as it is, anything else decoded and encoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            size, is_jpeg = image.size, image.format == "JPEG"
            pixels = None if is_jpeg else np.asarray(image.convert("RGB"))
    except (OSError, TypeError, ValueError) as e:
        raise DatasetError(f"the picture of step {step} is none ({e})", expected="PNG or JPEG", remedy="") from e
    check(size == (CAMERA_SIZE, CAMERA_SIZE), f"a picture of {size[1]} x {size[0]}", f"{CAMERA_SIZE} x {CAMERA_SIZE}")
    return data if pixels is None else encode_jpeg(pixels)


def check(condition: bool, got: str, expected: str) -> None:
    if not condition:
        raise DatasetError(got, expected=expected, remedy="Make the data set again.")


def _damaged(path: Path, e: Exception) -> DatasetError:
    return DatasetError(
        f"{path} cannot be read ({e})", expected="a file written by LeRobot", remedy="Download it again."
    )
