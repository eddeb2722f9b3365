"""A TFDS data set or a LeRobotDataset -> a FrameStore: one Ray task a shard, each finished one kept for the next run.

TensorFlow is imported in the tasks only. On a cluster the data root must be a folder that all machines share.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from spvla.cluster.connect import connection
from spvla.cluster.machines import cpus_to_use
from spvla.config import IndexConfig
from spvla.data import layout, lerobot, store
from spvla.data.layout import Layout, Part, Shard
from spvla.data.store import (
    FORMAT,
    INDEX,
    FrameStore,
    conclude,
    read_index,
    read_recording,
    write_batches,
)
from spvla.errors import DatasetError, SpvlaError, UserError
from spvla.files import expanded, safe_name, write_json
from spvla.progress import Progress
from spvla.reading import read_json
from spvla.types import Episode

FOLDER = "index"
ABANDONED_S = 3600.0  # a file that nobody has written to for so long


def index(config: IndexConfig) -> None:
    """`spvla index`: builds or completes the index and says what is in it."""
    root = expanded(config.data_root_dir, flag="--data_root_dir")
    path = ensure_index(root, config.dataset_name, skip_corrupt=config.skip_corrupt, num_workers=config.num_workers)
    store = FrameStore.open(path)
    print(f"index  {path}: {len(store.episode_lengths)} episodes, {len(store)} frames")
    for message in store.index["skipped"]:
        print(f"skipped  {message}")


def ensure_index(data_root_dir: Path, dataset_name: str, *, skip_corrupt: bool = False, num_workers: int = 0) -> Path:
    """The index's folder. Builds what is missing and what belongs to a shard that has changed since; what collect or
    regenerate recorded is an index already.

    Costs one stat a shard when nothing has changed. Raises DatasetError; finished shards stay for the next run.
    """
    folder = Path(data_root_dir) / safe_name(dataset_name, what="--dataset_name") / FOLDER
    if is_recorded(folder):
        return folder
    source = find(Path(data_root_dir), dataset_name)
    stale = [s for s in source.shards if not is_current(folder, s, skip_corrupt)]
    if not stale and matches(folder, source):
        return folder
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if (old := format_of(folder)) not in (None, FORMAT):
        print(f"index  {folder} has format {old}: made again in format {FORMAT}, which keeps wrist frames and proprio")
    if stale:
        with connection():
            index_shards(stale, folder, source, skip_corrupt, num_workers)
    with writing(folder):
        finish(folder, source)
    return folder


def require_source(data_root_dir: Path, dataset_name: str) -> None:
    """Raises DatasetError where there is neither a recorded data set nor one to index."""
    if not is_recorded(data_root_dir / safe_name(dataset_name, what="--dataset_name") / FOLDER):
        find(data_root_dir, dataset_name)


def find(data_root_dir: Path, dataset_name: str) -> Layout[Any]:
    """What there is to index: a LeRobotDataset or TFDS files. Raises DatasetError."""
    folder = data_root_dir / safe_name(dataset_name, what="--dataset_name")
    if lerobot.is_lerobot(folder):
        return lerobot.find(folder, dataset_name)
    return layout.find(data_root_dir, dataset_name)


def episodes_of(part: Part, skipped: list[str] | None) -> Iterator[Episode]:
    """Raises DatasetError for what is corrupt; with a list `skipped`, its message joins that list instead."""
    if isinstance(part, lerobot.Block):
        return part.read(skipped)
    from spvla.data.rlds import read_episodes  # TensorFlow, in this process only

    assert isinstance(part, Shard)
    return read_episodes([part], skipped=skipped)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says about a disk becomes one clear error."""
    try:
        yield
    except OSError as e:
        raise DatasetError(
            f"{path} cannot be written ({e.strerror or e})",
            expected="a folder this user can write to, on a disk with room",
            remedy="Free the disk or correct the permissions, and run again: finished shards are kept.",
        ) from e


def is_current(folder: Path, shard: Part, skip_corrupt: bool) -> bool:
    """Whether the shard was indexed, is as it was then, and lacks nothing that may not be lacking."""
    done = read_entry(folder, shard)
    return done is not None and done["source"] == shard.fingerprint() and (skip_corrupt or not done["skipped"])


def matches(folder: Path, source: Layout[Any]) -> bool:
    """Whether a whole index is there, of these shards in this order."""
    try:
        return [s["file"] for s in read_index(folder)["shards"]] == [file_name(s) for s in source.shards]
    except DatasetError:
        return False


def is_recorded(folder: Path) -> bool:
    """Whether the index was written without shards. Raises DatasetError for one in a form of the past."""
    if not _glance(folder / INDEX).get("recorded"):
        return False
    if (found := format_of(folder)) != FORMAT:
        raise DatasetError(
            f"{folder} was recorded in format {found}",
            expected=f"format {FORMAT}",
            remedy="Record it again with spvla collect or spvla regenerate.",
        )
    return True


def format_of(folder: Path) -> int | None:
    """Of the index that is there; None where there is none."""
    return _glance(folder / INDEX).get("format")


def _glance(path: Path) -> dict[str, Any]:
    """What is there; nothing where there is no file, or it is damaged: it is then made again."""
    with suppress(UserError):
        return read_json(path, remedy="")
    return {}


def file_name(shard: Part) -> str:
    return f"{shard.name}.arrow"


class Entry(store.Shard):
    """What is noted of a shard, beside its file."""

    format: int
    skipped: list[str]
    sha256: str
    source: Any


def read_entry(folder: Path, shard: Part) -> dict[str, Any] | None:
    """What was noted when the shard had been indexed; None if it never was, or its file has gone or changed."""
    try:
        entry = read_json(folder / f"{file_name(shard)}.json", Entry, remedy="")
        whole = (folder / entry["file"]).stat().st_size == entry["bytes"] and entry["format"] == FORMAT
    except (OSError, UserError):
        return None
    return entry if whole else None


def index_shards(shards: list[Part], folder: Path, source: Layout[Any], skip_corrupt: bool, num_workers: int) -> None:
    """Runs the tasks, `num_workers` at a time, and shows how far they are. The first error cancels the rest."""
    task = ray.remote(num_cpus=1, max_retries=2, max_calls=1)(index_shard)  # no process with TensorFlow is used again
    limit = num_workers or cpus_to_use()
    waiting = list(reversed(shards))
    running: list[Any] = []
    finished = len(source.shards) - len(shards)
    with Progress(f"index {source.name}", total=len(source.shards), unit="shards") as progress:
        progress.update(finished)
        while waiting or running:
            while waiting and len(running) < limit:
                running.append(task.remote(waiting.pop(), folder, skip_corrupt))
            done, running = ray.wait(running)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as e:
                for ref in running:
                    ray.cancel(ref)
                raise (e.cause if isinstance(e.cause, SpvlaError) else e) from None
            finished += len(done)
            progress.update(finished)


def index_shard(shard: Part, folder: Path, skip_corrupt: bool) -> None:
    """One shard -> one Arrow file and, after it, its entry. Both appear whole or not at all."""
    before, digest = shard.fingerprint(), shard.content_digest()
    done = read_entry(folder, shard)
    if done and done["sha256"] == digest and (skip_corrupt or not done["skipped"]):
        write_json(folder / f"{done['file']}.json", done | {"source": before})  # moved or touched, but the same
        return
    skipped: list[str] | None = [] if skip_corrupt else None
    path = folder / file_name(shard)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            lengths = write_batches(beside, episodes_of(shard, skipped))
            size_bytes = beside.stat().st_size
            beside.replace(path)
            entry = {
                "format": FORMAT,
                "file": path.name,
                "bytes": size_bytes,
                "split": shard.split,
                "episodes": len(lengths),
                "frames": sum(lengths),
                "skipped": skipped or [],
                "sha256": digest,
                "source": before,
            }
            write_json(folder / f"{path.name}.json", entry)
    finally:
        beside.unlink(missing_ok=True)


def finish(folder: Path, source: Layout[Any]) -> None:
    """Statistics over every episode, then the index itself, last."""
    found = [read_entry(folder, s) for s in source.shards]
    entries = [entry for entry in found if entry]
    if len(entries) < len(found):
        raise DatasetError(
            f"{folder} shows {len(entries)} of {len(found)} shards that were indexed",
            expected="all of them",
            remedy="Run the same command again; on a network file system they may appear after some seconds.",
        )
    skipped = [message for e in entries for message in e["skipped"]]
    if not any(e["episodes"] for e in entries if e["split"] == "train"):
        raise DatasetError(
            f"{source.folder} has no readable episode in its train split ({len(skipped)} skipped)",
            expected="at least one",
            remedy="Download or make the data set again.",
        )
    starts = read_recording(folder.parent).get("starts")
    conclude(folder, source.name, entries, skipped=skipped, starts=starts)
    tidy(folder, {e["file"] for e in entries})


def tidy(folder: Path, keep: set[str]) -> None:
    """Removes the files of shards that the source no longer has, and what killed tasks left long ago."""
    for path in folder.glob("*.arrow"):
        if path.name not in keep:
            path.unlink()
            path.with_name(f"{path.name}.json").unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        if time.time() - path.stat().st_mtime > ABANDONED_S:
            path.unlink(missing_ok=True)
