"""An indexed store -> a LeRobotDataset v3, which LeRobot's own reader opens. `lerobot.py` describes the files.

Pictures become H.264 video (crf 10, 4:2:0, a key frame every second frame), at LIBERO's 20 frames a second. State,
action (gripper -1 open, +1 closed) and task are kept exactly.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from spvla.data.lerobot import ACTION, CAMERAS, INFO, JOINTS, SCALING, STATE
from spvla.data.store import COLUMNS, FrameStore
from spvla.files import new_folder, write_json
from spvla.policies.openvla.actions import gripper_to_env
from spvla.policies.openvla.images import decode_jpeg
from spvla.progress import Progress
from spvla.types import CAMERA_SIZE

FPS = 20  # LIBERO's control steps a second
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
FILES_PER_CHUNK = 1000
DATA_ROWS = 500_000  # in a file: some 60 MB
VIDEO_FRAMES = 40_000  # in a file: 200 to 400 MB
SAMPLED_FRAMES = 500  # for the pictures' statistics
ENCODING = ["-crf", "10", "-g", "2", "-bf", "0", *SCALING]
KEYS = dict(zip(COLUMNS, (names[0] for names in CAMERAS), strict=True))  # camera -> feature


def export(store: FrameStore, folder: Path) -> Path:
    """Writes the data set; nothing is there before all of it is. Raises DatasetError for a torn picture."""
    cameras = {camera: KEYS[camera] for camera in store.cameras}
    columns = numbers_of(store)
    tasks = sorted(set(store.instructions))
    rows = [
        {"episode_index": e, "tasks": [store.instructions[e]], "length": n, "dataset_to_index": end}
        | {"dataset_from_index": end - n, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for e, (n, end) in enumerate(zip(store.episode_lengths, store.ends, strict=True))
    ]
    with new_folder(folder) as new:
        write_data(store, new, columns, [tasks.index(i) for i in store.instructions], rows)
        for camera, key in cameras.items():
            write_videos(store, new, camera, key, rows)
        write_table(new / EPISODES_PATH.format(chunk_index=0, file_index=0), pa.Table.from_pylist(rows))
        index = pd.Index(tasks, name="task")
        pd.DataFrame({"task_index": range(len(tasks))}, index=index).to_parquet(new / "meta/tasks.parquet")
        statistics = {name: moments(values) for name, values in columns.items()}
        statistics |= {key: moments_of_pictures(store, camera) for camera, key in cameras.items()}
        write_json(new / "meta/stats.json", statistics)
        write_json(new / INFO, info_of(store, columns, list(cameras.values()), len(tasks)))
    return folder


def numbers_of(store: FrameStore) -> dict[str, np.ndarray]:
    """Feature -> (N, width) float32, of what the store has."""
    found = {
        STATE: store.proprio,
        JOINTS: store.joint_states,
        ACTION: gripper_to_env(store.actions).astype(np.float32),
    }
    return {name: values for name, values in found.items() if values is not None}


def write_data(
    store: FrameStore, new: Path, columns: dict[str, np.ndarray], tasks: list[int], rows: list[dict[str, Any]]
) -> None:
    """The parquet files of frames; notes in each episode's row where its frames lie."""
    for number, episodes in enumerate(groups(store.episode_lengths, DATA_ROWS)):
        place = {"chunk_index": number // FILES_PER_CHUNK, "file_index": number % FILES_PER_CHUNK}
        first, last = store.ends[episodes[0]] - store.episode_lengths[episodes[0]], store.ends[episodes[-1]]
        episode = store.episodes[first:last].astype(np.int64)
        index = np.arange(first, last, dtype=np.int64)
        step = index - (np.array(store.ends) - store.episode_lengths)[episode]
        table = {
            **{name: fixed_lists(values[first:last]) for name, values in columns.items()},
            "timestamp": (step / FPS).astype(np.float32),
            "frame_index": step,
            "episode_index": episode,
            "index": index,
            "task_index": np.array(tasks, np.int64)[episode],
        }
        write_table(new / DATA_PATH.format(**place), pa.table(table))
        for e in episodes:
            rows[e] |= {f"data/{name}": value for name, value in place.items()}


def write_videos(store: FrameStore, new: Path, camera: str, key: str, rows: list[dict[str, Any]]) -> None:
    """One camera's videos; notes in each episode's row where its pictures lie."""
    with Progress(f"export {key}", total=len(store), unit="frames") as progress:
        for number, episodes in enumerate(groups(store.episode_lengths, VIDEO_FRAMES)):
            place = {"chunk_index": number // FILES_PER_CHUNK, "file_index": number % FILES_PER_CHUNK}
            path = new / VIDEO_PATH.format(video_key=key, **place)
            path.parent.mkdir(parents=True, exist_ok=True)
            video = imageio_ffmpeg.write_frames(
                str(path), (CAMERA_SIZE, CAMERA_SIZE), fps=FPS, quality=None, output_params=ENCODING
            )
            video.send(None)
            written = 0
            for e in episodes:
                rows[e] |= {f"videos/{key}/{name}": value for name, value in place.items()}
                rows[e][f"videos/{key}/from_timestamp"] = written / FPS
                for i in range(store.ends[e] - store.episode_lengths[e], store.ends[e]):
                    video.send(decode_jpeg(store.jpeg(i, camera)))
                written += store.episode_lengths[e]
                rows[e][f"videos/{key}/to_timestamp"] = written / FPS
                progress.update(store.ends[e])
            video.close()


def groups(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Consecutive episodes, of `size` frames together at most unless one is longer."""
    chosen: list[int] = []
    frames = 0
    for episode, length in enumerate(lengths):
        if chosen and frames + length > size:
            yield chosen
            chosen, frames = [], 0
        chosen.append(episode)
        frames += length
    yield chosen


def info_of(store: FrameStore, columns: dict[str, np.ndarray], keys: list[str], tasks: int) -> dict[str, Any]:
    video = {
        "video.height": CAMERA_SIZE,
        "video.width": CAMERA_SIZE,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": FPS,
        "video.channels": 3,
        "has_audio": False,
    }
    shape = {"shape": [CAMERA_SIZE, CAMERA_SIZE, 3], "names": ["height", "width", "channel"]}
    features: dict[str, Any] = {key: {"dtype": "video", **shape, "info": video} for key in keys}
    features |= {n: {"dtype": "float32", "shape": [v.shape[1]], "names": None} for n, v in columns.items()}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "robot_type": "panda",
        "total_episodes": len(store.episode_lengths),
        "total_frames": len(store),
        "total_tasks": tasks,
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": FPS,
        "splits": {"train": f"0:{len(store.episode_lengths)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }


def moments(values: np.ndarray) -> dict[str, Any]:
    """Of (N, width) numbers, as LeRobot names them."""
    quantiles = {f"q{q:02d}": np.quantile(values.astype(np.float64), q / 100, 0) for q in (1, 10, 50, 90, 99)}
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)} | quantiles
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(values)]}


def moments_of_pictures(store: FrameStore, camera: str) -> dict[str, Any]:
    """Of each channel over evenly spaced frames, in [0, 1], shaped (3, 1, 1)."""
    chosen = np.unique(np.linspace(0, len(store) - 1, SAMPLED_FRAMES).astype(int)).tolist()
    pixels = np.stack([decode_jpeg(store.jpeg(i, camera))[::4, ::4] for i in chosen]).reshape(-1, 3) / 255
    found = {name: np.reshape(v, (3, 1, 1)).tolist() for name, v in moments(pixels).items() if name != "count"}
    return found | {"count": [len(chosen)]}


def fixed_lists(rows: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
