"""Indexed frames on disk: written once, memory-mapped, read by number.

DATA_ROOT/NAME/index/libero_spatial-train.tfrecord-00000-of-00016.arrow        one for each shard of the source
                     libero_spatial-train.tfrecord-00000-of-00016.arrow.json   written after it: sizes, source digest
                     dataset_statistics.json                                   as OpenVLA writes it
                     index.json                                                written last; without it, no index

Arrow's IPC format (pyarrow, which Ray stands on, too): a file is a list of record batches, here one an episode, with
columns `image` (JPEG, as in the source), `action` (7 float32, after the LIBERO transform) and `instruction`. Mapping it
costs no memory, all processes of a machine share one copy in the page cache, and any frame is one slice away.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spvla.errors import DatasetError
from spvla.policies.openvla.actions import ActionStats, env_to_dataset
from spvla.types import ACTION_DIM, Episode, Frame

FORMAT = 1  # raise when the files' meaning changes: older indices are then made again
INDEX, STATISTICS = "index.json", "dataset_statistics.json"
HELD_OUT = 0.05  # of the episodes, the last ones, when the source has no validation split
SCHEMA = pa.schema(
    [("image", pa.binary()), ("action", pa.list_(pa.float32(), ACTION_DIM)), ("instruction", pa.string())]
)


class FrameStore:
    """`store[i]` is a Frame. Opening maps the files; a store may be shared by threads and sent to other processes."""

    def __init__(self, folder: Path) -> None:
        """Use `open`."""
        self.folder = folder
        self.index = read_index(folder)
        self.name: str = self.index["dataset_name"]
        self.digest: str = self.index["digest"]
        self.batches: list[pa.RecordBatch] = [
            batch for s in self.index["shards"] for batch in read_batches(folder / s["file"], s["bytes"])
        ]
        self.episode_lengths = [b.num_rows for b in self.batches]
        self.ends = list(accumulate(self.episode_lengths))

    @classmethod
    def open(cls, path: Path) -> "FrameStore":
        """`path` is the index folder. Raises DatasetError if the index is missing, half-written or damaged."""
        return cls(Path(path))

    def __reduce__(self) -> tuple:
        return FrameStore, (self.folder,)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Frame:
        if not 0 <= i < len(self):
            raise IndexError(f"frame {i} of {len(self)}")
        episode = bisect_right(self.ends, i)
        batch = self.batches[episode]
        step = i - (self.ends[episode] - batch.num_rows)
        image, action, instruction = (column[step] for column in batch.columns)
        return Frame(
            image=image.as_py(),
            action=action.values.to_numpy(),
            instruction=instruction.as_py(),
            episode=episode,
            step=step,
        )

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """What dataset_statistics.json holds: {name: {"action": ..., "proprio": ..., "num_transitions": ...}}."""
        return json.loads((self.folder / STATISTICS).read_text())

    @cached_property
    def action_stats(self) -> ActionStats:
        return ActionStats.from_json(self.statistics[self.name]["action"])

    def split(self, name: str, *, val_split_from_train: bool = True) -> range:
        """Frame numbers of "train" or "val".

        When the source has no validation split, the last 5% of its episodes are held out (as OpenVLA does) unless
        `val_split_from_train` is False; then "train" is everything and "val" is empty.
        """
        first = self._first_val_episode(val_split_from_train)
        border = self.ends[first - 1] if first else 0
        return range(border) if name == "train" else range(border, len(self))

    def _first_val_episode(self, val_split_from_train: bool) -> int:
        own = sum(s["episodes"] for s in self.index["shards"] if s["split"] == "train")
        if own < len(self.batches) or not val_split_from_train:
            return own
        return round((1 - HELD_OUT) * own)  # TFDS's own rounding of train[:95%]


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.exists():
        raise DatasetError(
            f"{folder} holds no whole index", expected=f"a folder with {INDEX}", remedy="Run spvla index again."
        )
    try:
        index = json.loads(path.read_text())
    except ValueError:
        index = {}
    if index.get("format") != FORMAT:
        raise DatasetError(
            f"{path} has format {index.get('format')}", expected=f"{FORMAT}", remedy="Run spvla index again."
        )
    return index


def read_batches(path: Path, size_bytes: int) -> list[pa.RecordBatch]:
    """The episodes of one file, mapped rather than read."""
    try:
        found = path.stat().st_size
        if found != size_bytes:
            raise pa.ArrowInvalid(f"it has {found} bytes instead of {size_bytes}")
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (OSError, pa.ArrowInvalid) as e:
        raise DatasetError(
            f"{path} is damaged ({e})", expected="the file that spvla index wrote", remedy="Run spvla index again."
        ) from e


def write_batches(path: Path, episodes: Iterable[Episode]) -> list[int]:
    """Writes one file, holding one episode in memory at a time; returns the episodes' lengths."""
    lengths = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for episode in episodes:
            actions = pa.array(env_to_dataset(episode.actions).ravel())
            writer.write_batch(
                pa.record_batch(
                    [
                        pa.array(episode.images, pa.binary()),
                        pa.FixedSizeListArray.from_arrays(actions, ACTION_DIM),
                        pa.repeat(pa.scalar(episode.instruction), len(episode.images)),
                    ],
                    schema=SCHEMA,
                )
            )
            lengths.append(len(episode.images))
    return lengths


def actions_of(batches: list[pa.RecordBatch]) -> np.ndarray:
    """Every action, (N, 7) float32, in order."""
    return np.concatenate([b["action"].flatten().to_numpy().reshape(-1, ACTION_DIM) for b in batches])


def statistics_of(actions: np.ndarray, trajectories: int) -> dict[str, Any]:
    """One data set's entry of dataset_statistics.json from all its actions, (N, 7) float32.

    `proprio` is zeros, as in the original, whose fine-tuning uses no proprioception.
    """
    action = {
        "mean": actions.mean(0).tolist(),
        "std": actions.std(0).tolist(),
        "max": actions.max(0).tolist(),
        "min": actions.min(0).tolist(),
        "q01": [quantile(column, 0.01) for column in actions.T],
        "q99": [quantile(column, 0.99) for column in actions.T],
    }
    return {
        "action": action | {"mask": [True] * (ACTION_DIM - 1) + [False]},
        "proprio": {k: [0.0] * ACTION_DIM for k in action},
        "num_transitions": len(actions),
        "num_trajectories": trajectories,
    }


def quantile(values: np.ndarray, q: float) -> float:
    """In float64, as numpy 1 did for float32, too: its successor rounds otherwise."""
    return float(np.quantile(values.astype(np.float64), q))
