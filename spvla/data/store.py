"""Indexed frames on disk: written once, memory-mapped, read by number.

DATA_ROOT/NAME/index/libero_spatial-train.tfrecord-00000-of-00016.arrow        one for each shard of the source, or
                     libero_spatial_no_noops-train-00000-of-00016.arrow        as recorded by this project
                     libero_spatial-train.tfrecord-00000-of-00016.arrow.json   written after it: sizes, source digest
                     dataset_statistics.json                                   OpenVLA's form, of actions and proprio
                     index.json                                                written last; without it, no index

Arrow's IPC format (pyarrow, which Ray stands on, too): a file is a list of record batches, here one an episode, with
columns `image` and `wrist_image` (JPEG, as in the source), `proprio` (8 float32), `joint_state` (7 float32), `action`
(7 float32, after the LIBERO transform), `instruction` and `source`; pictures of the wrist and states are null where the
source has none. Mapping it costs no memory, all processes of a machine share one copy in the page cache, and any frame
is one slice away. Nothing of an episode is lost, so that a data set can be written from it (`spvla export`).
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from annotated_types import Predicate
from typing_extensions import TypedDict

from spvla.errors import DatasetError
from spvla.files import write_json
from spvla.policies.oft.proprio import ProprioStats
from spvla.policies.openvla.actions import ActionStats, env_to_dataset, gripper_to_env
from spvla.policies.statistics import require_statistics
from spvla.reading import Count, read_json, require_form
from spvla.types import ACTION_DIM, PROPRIO_DIM, Episode, Frame

FORMAT = 3  # raise when the files' meaning changes: older indices are then made again
INDEX, STATISTICS = "index.json", "dataset_statistics.json"
RECORDING = "recording.json"  # beside the index: how this project recorded the data set
HELD_OUT = 0.05  # of the episodes, the last ones, when the source has no validation split
COLUMNS = {"agentview": "image", "robot0_eye_in_hand": "wrist_image"}  # camera -> column
JOINTS = 7  # of the arm
SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("wrist_image", pa.binary()),
        ("proprio", pa.list_(pa.float32(), PROPRIO_DIM)),
        ("joint_state", pa.list_(pa.float32(), JOINTS)),
        ("action", pa.list_(pa.float32(), ACTION_DIM)),
        ("instruction", pa.string()),
        ("source", pa.string()),
    ]
)


class FrameStore:
    """`store[i]` is a Frame. Opening maps the files; a store may be shared by threads and sent to other processes.

    N frames in E episodes. `actions`, `proprio` and `instructions` are read once and stay in memory (60 bytes a frame);
    `jpeg` reads a picture from the mapped files.
    """

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

    def __reduce__(self) -> tuple[Any, ...]:
        return FrameStore, (self.folder,)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Frame:
        episode, step = self._place(i)
        return Frame(
            image=bytes(self.jpeg(i, "agentview")),
            wrist_image=self.batches[episode]["wrist_image"][step].as_py(),
            proprio=None if self.proprio is None else self.proprio[i],
            action=self.actions[i],
            instruction=self.instructions[episode],
            episode=episode,
            step=step,
        )

    def jpeg(self, i: int, camera: str) -> memoryview:
        """The picture of frame `i`, as it lies in the file. Raises KeyError for a camera that is not in `cameras`."""
        episode, step = self._place(i)
        return memoryview(self.batches[episode][COLUMNS[camera]][step].as_buffer()).cast("B")

    def episode(self, number: int) -> Episode:
        """One whole episode as it was recorded. Raises DatasetError where its source lacked pictures or states."""
        batch = self.batches[number]
        if missing := [name for name in ("wrist_image", "proprio", "joint_state") if batch[name].null_count]:
            raise DatasetError(
                f"episode {number} of {self.folder} has no {', '.join(missing)}",
                expected="both cameras' pictures and all states",
                remedy="Give a data set that spvla collect or spvla regenerate recorded.",
            )
        return Episode(
            images=batch["image"].to_pylist(),
            wrist_images=batch["wrist_image"].to_pylist(),
            states=rows_of([batch], "proprio", PROPRIO_DIM),
            joint_states=rows_of([batch], "joint_state", JOINTS),
            actions=gripper_to_env(rows_of([batch], "action", ACTION_DIM)).astype(np.float32),
            instruction=batch["instruction"][0].as_py(),
            source=batch["source"][0].as_py(),
        )

    def _place(self, i: int) -> tuple[int, int]:
        """Episode, and the step in it."""
        if not 0 <= i < len(self):
            raise IndexError(f"frame {i} of {len(self)}")
        episode = bisect_right(self.ends, i)
        return episode, i - (self.ends[episode] - self.episode_lengths[episode])

    @cached_property
    def cameras(self) -> tuple[str, ...]:
        """Those of which every frame has a picture."""
        return tuple(c for c, column in COLUMNS.items() if not any(b[column].null_count for b in self.batches))

    @cached_property
    def actions(self) -> np.ndarray:
        """(N, 7) float32."""
        return actions_of(self.batches)

    @cached_property
    def proprio(self) -> np.ndarray | None:
        """(N, 8) float32; None where the data set has no states."""
        return proprio_of(self.batches)

    @cached_property
    def joint_states(self) -> np.ndarray | None:
        """(N, 7) float32; None where the data set has none."""
        if any(b["joint_state"].null_count for b in self.batches):
            return None
        return rows_of(self.batches, "joint_state", JOINTS)

    @cached_property
    def instructions(self) -> list[str]:
        """One of each episode."""
        return [b["instruction"][0].as_py() for b in self.batches]

    @cached_property
    def episodes(self) -> np.ndarray:
        """(N,) int32: each frame's episode."""
        return np.repeat(np.arange(len(self.batches), dtype=np.int32), self.episode_lengths)

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """What dataset_statistics.json holds: {name: {"action": ..., "proprio": ..., "num_transitions": ...}}."""
        return read_statistics(self.folder, self.name)

    def adopt_statistics(self, held: dict[str, Any]) -> None:
        """Normalises from here on by what a policy already acts by: its tokens mean those numbers, whatever these data
        would give. `held` is its entry for this data set; a plain policy's has no states."""
        own = self.statistics[self.name]
        real = any(np.any(values) for values in held.get("proprio", {}).values())
        adopted = own | {"action": held["action"]} | ({"proprio": held["proprio"]} if real else {})
        self.statistics = {self.name: adopted}

    @cached_property
    def action_stats(self) -> ActionStats:
        return ActionStats.from_json(self.statistics[self.name]["action"])

    @cached_property
    def proprio_stats(self) -> ProprioStats:
        return ProprioStats.from_json(self.statistics[self.name]["proprio"], name=self.name)

    def split(self, name: str, *, val_split_from_train: bool = True) -> range:
        """Frame numbers of "train" or "val".

        When the source has no validation split, the last 5% of its episodes are held out (as OpenVLA does) unless
        `val_split_from_train` is False; then "train" is everything and "val" is empty.
        """
        first = self._first_val_episode(val_split_from_train)
        border = self.ends[first - 1] if first else 0
        return range(border) if name == "train" else range(border, len(self))

    def current_frames(self, name: str, *, chunk: int = 1, val_split_from_train: bool = True) -> np.ndarray:
        """Frames of a split that have `chunk` actions of their episode from there on: (S,) int64.

        An episode of T steps has T - chunk + 1 of them, so its last steps are only ever futures (as in OpenVLA-OFT).
        """
        frames = np.array(self.split(name, val_split_from_train=val_split_from_train), np.int64)
        ends = np.repeat(self.ends, self.episode_lengths)[frames]
        return frames[frames + chunk <= ends]

    def _first_val_episode(self, val_split_from_train: bool) -> int:
        own = sum(s["episodes"] for s in self.index["shards"] if s["split"] == "train")
        if own < len(self.batches) or not val_split_from_train:
            return own
        return round((1 - HELD_OUT) * own)  # TFDS's own rounding of train[:95%]


class Shard(TypedDict):
    """A file of the index."""

    file: Annotated[str, Predicate(lambda name: Path(name).name == name)]
    bytes: Count
    split: str
    episodes: Count
    frames: Count


class IndexForm(TypedDict):
    """index.json, of this FORMAT."""

    dataset_name: str
    digest: str
    episodes: Count
    frames: Count
    skipped: list[str]
    shards: list[Shard]


def read_statistics(folder: Path, name: str) -> dict[str, Any]:
    """Of an index of data set `name`. Raises DatasetError."""
    path = folder / STATISTICS
    how: dict[str, Any] = {"remedy": "Run spvla index again.", "error": DatasetError}
    stats = require_statistics(read_json(path, **how), str(path), **how)
    if name not in stats:
        raise DatasetError(f"{path} has statistics of {', '.join(stats)}", expected=name, remedy=how["remedy"])
    return stats


def read_recording(dataset: Path) -> dict[str, Any]:
    """What the recording of a data set says of itself; nothing where there is none."""
    with suppress(DatasetError):
        return read_json(dataset / RECORDING, remedy="", error=DatasetError)
    return {}


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.exists():
        raise DatasetError(
            f"{folder} holds no whole index", expected=f"a folder with {INDEX}", remedy="Run spvla index again."
        )
    index = read_json(path, remedy="Run spvla index again.", error=DatasetError)
    if index.get("format") != FORMAT:
        raise DatasetError(
            f"{path} has format {index.get('format')}", expected=f"{FORMAT}", remedy="Run spvla index again."
        )
    return require_form(index, IndexForm, str(path), remedy="Run spvla index again.", error=DatasetError)


def read_batches(path: Path, size_bytes: int) -> list[pa.RecordBatch]:
    """The episodes of one file, mapped rather than read."""
    try:
        found = path.stat().st_size
        if found != size_bytes:
            raise pa.ArrowInvalid(f"it has {found} bytes instead of {size_bytes}")
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:
            _require_sound(batch)
        return batches
    except (OSError, pa.ArrowException) as e:
        raise DatasetError(
            f"{path} is damaged ({e})", expected="the file that spvla index wrote", remedy="Run spvla index again."
        ) from e


def _require_sound(batch: pa.RecordBatch) -> None:
    """Raises ArrowInvalid for an episode whose lengths and offsets do not fit the file: reading it could end the
    process. What the pictures hold is not looked at."""
    batch.validate(full=True)
    if not batch.schema.equals(SCHEMA) or not batch.num_rows:
        raise pa.ArrowInvalid(f"it has {batch.num_rows} rows of {', '.join(batch.schema.names)}")


def write_batches(path: Path, episodes: Iterable[Episode]) -> list[int]:
    """Writes one file, holding one episode in memory at a time; returns the episodes' lengths."""
    lengths = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for episode in episodes:
            steps = len(episode.images)
            columns = [
                pa.array(episode.images, pa.binary()),
                pa.array(episode.wrist_images or [None] * steps, pa.binary()),
                fixed_lists(episode.states, PROPRIO_DIM, steps),
                fixed_lists(episode.joint_states, JOINTS, steps),
                fixed_lists(env_to_dataset(episode.actions), ACTION_DIM, steps),
                pa.repeat(pa.scalar(episode.instruction), steps),
                pa.repeat(pa.scalar(episode.source), steps),
            ]
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            lengths.append(steps)
    return lengths


def conclude(
    folder: Path,
    name: str,
    entries: Sequence[dict[str, Any]],
    *,
    skipped: Sequence[str] = (),
    starts: str | None = None,
    recorded: bool = False,
) -> None:
    """Writes the statistics over every episode, then the index itself, last.

    An entry is a file: `file`, `bytes`, `split`, `episodes`, `frames`, and `sha256` of what it was made from. `starts`
    ("fresh" or "test") joins the statistics, which go with every checkpoint: a report then knows whether a policy has
    seen its exam. `recorded`: the files are the data set, and there are no shards to read again.
    """
    batches = [b for e in entries for b in read_batches(folder / e["file"], e["bytes"])]
    statistics = statistics_of(actions_of(batches), proprio_of(batches), len(batches))
    write_json(folder / STATISTICS, {name: statistics | ({"starts": starts} if starts else {})})
    whole = {
        "format": FORMAT,
        "dataset_name": name,
        "recorded": recorded,
        "digest": hashlib.sha256("".join(f"{e['split']} {e['sha256']}\n" for e in entries).encode()).hexdigest(),
        "episodes": len(batches),
        "frames": sum(b.num_rows for b in batches),
        "skipped": list(skipped),
        "shards": [{k: e[k] for k in ("file", "bytes", "split", "episodes", "frames")} for e in entries],
    }
    write_json(folder / INDEX, whole)


def fixed_lists(rows: np.ndarray, width: int, steps: int) -> pa.Array:
    """(T, width) float32 as a column; nulls where there are no rows."""
    if not len(rows):
        return pa.nulls(steps, pa.list_(pa.float32(), width))
    return pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(rows, np.float32).ravel()), width)


def actions_of(batches: list[pa.RecordBatch]) -> np.ndarray:
    """Every action, (N, 7) float32, in order."""
    return rows_of(batches, "action", ACTION_DIM)


def proprio_of(batches: list[pa.RecordBatch]) -> np.ndarray | None:
    """Every state, (N, 8) float32, in order; None where an episode has none."""
    if any(b["proprio"].null_count for b in batches):
        return None
    return rows_of(batches, "proprio", PROPRIO_DIM)


def rows_of(batches: list[pa.RecordBatch], column: str, width: int) -> np.ndarray:
    return np.concatenate([b[column].flatten().to_numpy().reshape(-1, width) for b in batches])


def statistics_of(actions: np.ndarray, proprio: np.ndarray | None, trajectories: int) -> dict[str, Any]:
    """One data set's entry of dataset_statistics.json, from all its actions (N, 7) and states (N, 8), float32."""
    entry = {
        "action": moments_of(actions) | {"mask": [True] * (ACTION_DIM - 1) + [False]},
        "proprio": {} if proprio is None else moments_of(proprio),
        "num_transitions": len(actions),
        "num_trajectories": trajectories,
    }
    return without_proprio(entry) if proprio is None else entry


def without_proprio(entry: dict[str, Any]) -> dict[str, Any]:
    """A data set's entry as OpenVLA writes it, which uses no proprioception: seven zeros for each moment."""
    return entry | {"proprio": {name: [0.0] * ACTION_DIM for name in entry["action"] if name != "mask"}}


def moments_of(rows: np.ndarray) -> dict[str, Any]:
    return {
        "mean": rows.mean(0).tolist(),
        "std": rows.std(0).tolist(),
        "max": rows.max(0).tolist(),
        "min": rows.min(0).tolist(),
        "q01": [quantile(column, 0.01) for column in rows.T],
        "q99": [quantile(column, 0.99) for column in rows.T],
    }


def quantile(values: np.ndarray, q: float) -> float:
    """Linear between neighbours, as numpy 1 took it of float32 and its successor no longer does: the neighbours'
    distance in float32, all else in float64."""
    ordered, at = np.sort(values), q * (len(values) - 1)
    below = int(at)
    low, high = ordered[below], ordered[min(below + 1, len(values) - 1)]
    distance, share = float(high - low), at - below
    return float(high) - distance * (1 - share) if share >= 0.5 else float(low) + distance * share
