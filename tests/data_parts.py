"""Small real data sets for the tests: TFDS folders of JPEG frames of 256 x 256, written by the project itself."""

import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from spvla.data import index
from spvla.data.store import FrameStore, conclude, write_batches
from spvla.policies.openvla.images import encode_jpeg
from spvla.types import Episode

NAME = "libero_object_no_noops"
SENTENCES = ("pick up the milk and place it in the basket", "pick up the butter and place it in the basket")


@cache
def frame(number: int, size: int = 256) -> bytes:
    """A JPEG of a gradient; another one for each of 64 numbers."""
    y, x = np.mgrid[:size, :size]
    level = 4 * (number % 64)
    return encode_jpeg(np.stack([x % 256, y % 256, np.full_like(x, level)], -1).astype(np.uint8))


def episode(number: int, steps: int = 4, **changes: object) -> Episode:
    """The `number`-th of a series: different actions and frames, two instructions in turn."""
    rng = np.random.default_rng(number)
    actions = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
    actions[:, 6] = np.sign(actions[:, 6])
    images = [frame(number * 7 + t) for t in range(steps)]
    fields: dict = {
        "images": images,
        "wrist_images": images[::-1],
        "states": rng.normal(size=(steps, 8)).astype(np.float32),
        "joint_states": rng.normal(size=(steps, 7)).astype(np.float32),
        "actions": actions,
        "instruction": SENTENCES[number % 2],
        "source": f"demo_{number}.hdf5",
    }
    return Episode(**(fields | changes))


def write(root: Path, episodes: Sequence[Episode], *, shards: int = 1, name: str = NAME) -> Path:
    """A data set of so many shards; returns the version's folder."""
    from spvla.data import rlds  # brings TensorFlow in: only for tests that write

    size = sum(len(rlds.serialise(rlds.libero_features(), e)) for e in episodes)
    folder = rlds.write_dataset(iter(episodes), root, name, shard_bytes=-(-size // shards))
    assert len(shard_files(folder)) == shards
    return folder


def index_here(root: Path, name: str = NAME, *, skip_corrupt: bool = False) -> FrameStore:
    """What the Ray tasks and their driver do, one after the other in this process."""
    source, folder = index.find(root, name), root / name / index.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for shard in source.shards:
        index.index_shard(shard, folder, skip_corrupt)
    index.finish(folder, source)
    return FrameStore.open(folder)


def store_of(root: Path, episodes: Sequence[Episode], name: str = NAME) -> FrameStore:
    """A store of one file, in the order given."""
    folder = root / name / index.FOLDER
    folder.mkdir(parents=True)
    path = folder / "episodes.arrow"
    lengths = write_batches(path, episodes)
    entry = {"file": path.name, "bytes": path.stat().st_size, "split": "train", "episodes": len(lengths)}
    conclude(folder, name, [entry | {"frames": sum(lengths), "sha256": "0"}], recorded=True)
    return FrameStore.open(folder)


def copy_dataset(source: Path, target: Path) -> None:
    """Of files that may be read-only."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    target.chmod(0o755)


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tfrecord-*"))


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def corrupt(path: Path, record: int) -> None:
    """Flips a byte in the data of a TFRecord file's `record`-th record."""
    offset = 0
    for _ in range(record):
        offset += 12 + int.from_bytes(path.read_bytes()[offset : offset + 8], "little") + 4
    flip_byte(path, offset + 1000)
