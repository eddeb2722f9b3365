"""TFDS files <-> episodes. The only module that imports TensorFlow; training and simulation never import this one.

A record is a tf.train.Example of one whole episode of T steps: each feature is flat, T values (or T x shape) long.
JPEG frames pass through as they are, both ways.
"""

import errno
import hashlib
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from google.protobuf.message import DecodeError
from simplejpeg import decode_jpeg_header, is_jpeg

from spvla.files import without_stderr

with without_stderr():  # TensorFlow's C++ greets before any setting of its own could stop it
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from tensorflow.python.lib.io import tf_record

from spvla.data.layout import FRAME_SHAPE, Shard
from spvla.errors import DatasetError
from spvla.files import new_folder, safe_name
from spvla.types import ACTION_DIM, PROPRIO_DIM, Episode

VERSION = "1.0.0"
SHARD_BYTES = 64 << 20  # small enough to index in parallel, large enough for few files
HEADER_BYTES, FOOTER_BYTES = 12, 4  # of a TFRecord: length and its CRC; the data's CRC


def read_episodes(shards: Iterable[Shard], *, skipped: list[str] | None = None) -> Iterator[Episode]:
    """Every episode, in order. A corrupt record raises DatasetError, which names shard and record.

    With a list `skipped`, its message joins that list instead and reading goes on.
    """
    for shard in shards:
        for number, record in read_records(shard, skipped):
            try:
                yield to_episode(record)
            except DatasetError as e:
                bad_record(shard, number, e.got, skipped, expected=e.expected)
            except (DecodeError, UnicodeDecodeError, IndexError) as e:
                bad_record(shard, number, f"it is no episode ({str(e) or type(e).__name__})", skipped)


def read_records(shard: Shard, skipped: list[str] | None) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each record whose checksum is right."""
    reader = tf_record.tf_record_random_reader(str(shard.path))
    size, offset, number = shard.path.stat().st_size, 0, 0
    while offset < size:
        try:
            record, offset = reader.read(offset)
            yield number, record
        except (tf.errors.DataLossError, IndexError):
            bad_record(shard, number, "the checksum is wrong or the file ends early", skipped)
            offset = next_offset(shard.path, offset) or size
        number += 1
    for missing in range(number, shard.records):
        bad_record(shard, missing, "the file ends before it", skipped)
    if number > shard.records:
        raise DatasetError(
            f"{shard.path.name} holds {number} records",
            expected=f"{shard.records}, as dataset_info.json says",
            remedy="Download the data set again, whole.",
        )


def bad_record(
    shard: Shard, number: int, why: str, skipped: list[str] | None, expected: str = "a whole record"
) -> None:
    message = f"{shard.path.name} record {number} of {shard.records}: {why}"
    if skipped is None:
        remedy = "Download or make that shard again, or leave such records out with --skip_corrupt True."
        raise DatasetError(message, expected=expected, remedy=remedy)
    skipped.append(message)


def next_offset(path: Path, offset: int) -> int | None:
    """Where the record after a corrupt one begins; None where its length is corrupt as well."""
    with path.open("rb") as f:
        f.seek(offset)
        header = f.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES or masked_crc32c(header[:8]) != struct.unpack("<I", header[8:])[0]:
        return None
    return offset + HEADER_BYTES + struct.unpack("<Q", header[:8])[0] + FOOTER_BYTES


def masked_crc32c(data: bytes) -> int:
    """CRC-32C in the masked form that TFRecord files use; only for their 8-byte lengths, so slow and short."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def to_episode(record: bytes) -> Episode:
    """Raises DatasetError saying what is wrong with it."""
    features = tf.train.Example.FromString(record).features.feature
    blobs = {k: v.bytes_list.value for k, v in features.items() if v.WhichOneof("kind") == "bytes_list"}
    images = list(blobs.get("steps/observation/image", ()))
    check(len(images) > 0, "no frames in steps/observation/image", "at least one")
    instruction = blobs["steps/language_instruction"][0].decode() if "steps/language_instruction" in blobs else ""
    check(bool(instruction.strip()), "an empty language_instruction", "a sentence")
    wrist_images = list(blobs.get("steps/observation/wrist_image", ()))
    check(len(wrist_images) in (0, len(images)), f"{len(wrist_images)} wrist frames", f"{len(images)}, or none")
    for step, image in (*enumerate(images), *enumerate(wrist_images)):
        check_frame(image, step)
    return Episode(
        images=images,
        wrist_images=wrist_images,
        states=optional_floats(features, "steps/observation/state", len(images), PROPRIO_DIM),
        joint_states=optional_floats(features, "steps/observation/joint_state", len(images), 7),
        actions=floats(features, "steps/action", len(images), ACTION_DIM),
        instruction=instruction,
        source=b"".join(blobs.get("episode_metadata/file_path", ())).decode(),
    )


def optional_floats(features: dict[str, Any], name: str, steps: int, width: int) -> np.ndarray:
    """(T, width) float32; (0, width) where the data set lacks it."""
    return floats(features, name, steps, width) if name in features else np.zeros((0, width), np.float32)


def floats(features: dict[str, Any], name: str, steps: int, width: int) -> np.ndarray:
    """(T, width) float32."""
    values = np.array(features[name].float_list.value if name in features else (), np.float32)
    check(values.size == steps * width, f"{name} has {values.size} values for {steps} steps", f"{width} a step")
    rows = values.reshape(steps, width)
    finite = np.isfinite(rows).all(axis=1)
    check(bool(finite.all()), f"{name} is NaN or infinite at step {int(np.argmin(finite))}", "finite numbers")
    return rows


def check_frame(image: bytes, step: int) -> None:
    expected = f"JPEG of {FRAME_SHAPE[0]} x {FRAME_SHAPE[1]}"
    check(is_jpeg(image), f"the frame of step {step} is no JPEG", expected)
    try:
        height, width, _, _ = decode_jpeg_header(image)
    except ValueError:
        height = width = 0
    check((height, width) == FRAME_SHAPE[:2], f"the frame of step {step} is {height} x {width}", expected)


def check(condition: bool, got: str, expected: str) -> None:
    if not condition:
        raise DatasetError(got, expected=expected, remedy="Make the data set again.")


# --- writing ---


def write_dataset(
    episodes: Iterator[Episode],
    data_root_dir: Path,
    dataset_name: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    in_order: bool = False,
) -> Path:
    """Writes DATA_ROOT/NAME/1.0.0 and returns it; nothing is there before all of it is.

    Unless `in_order`, episodes are ordered by the digest of their content, so that the last 5% are a fair sample (TFDS
    shuffles, too) and the order in which parallel workers deliver does not matter. Raises DatasetError on no episode or
    a full disk.
    """
    folder = data_root_dir / safe_name(dataset_name, what="dataset_name") / VERSION
    features = libero_features()
    try:
        with new_folder(folder) as new, tempfile.TemporaryFile(dir=new) as unordered:
            index = [spool(serialise(features, e), unordered) for e in episodes]
            check(len(index) > 0, f"no episodes for {folder}", "at least one")
            lengths, size = write_shards(
                index if in_order else sorted(index), unordered, new, dataset_name, shard_bytes
            )
            write_info(features, new, dataset_name, lengths, size)
    except (OSError, tf.errors.OpError) as e:
        raise DatasetError(
            f"{folder} cannot be written ({os.strerror(errno.ENOSPC) if disk_is_full(e) else e})",
            expected="room on that disk",
            remedy="Free the disk or give another --data_root_dir; nothing was left behind.",
        ) from e
    return folder


def disk_is_full(e: Exception) -> bool:
    return getattr(e, "errno", None) == errno.ENOSPC or isinstance(e, tf.errors.ResourceExhaustedError)


def spool(record: bytes, file: IO[bytes]) -> tuple[str, int, int]:
    """Appends a record and returns (digest, offset, length)."""
    offset = file.tell()
    file.write(record)
    return hashlib.sha256(record).hexdigest(), offset, len(record)


def write_shards(
    index: list[tuple[str, int, int]], records: IO[bytes], folder: Path, name: str, shard_bytes: int
) -> tuple[list[int], int]:
    """Copies the records, in the index's order, into shards of about `shard_bytes`; returns lengths and total bytes."""
    size = sum(length for _, _, length in index)
    groups = np.array_split(np.arange(len(index)), min(len(index), -(-size // shard_bytes)))
    for i, group in enumerate(groups):
        with tf.io.TFRecordWriter(str(folder / f"{name}-train.tfrecord-{i:05d}-of-{len(groups):05d}")) as shard:
            for _, offset, length in (index[k] for k in group):
                records.seek(offset)
                shard.write(records.read(length))
    return [len(group) for group in groups], size


def write_info(features: tfds.features.FeaturesDict, folder: Path, name: str, lengths: list[int], size: int) -> None:
    """features.json and dataset_info.json, by TFDS itself."""
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name,
        version=tfds.core.Version(VERSION),
        data_dir=str(folder),
        module_name="spvla.data.rlds",
        release_notes={VERSION: "Initial release."},
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=features,
        description="Demonstrations in LIBERO, in the layout of OpenVLA's modified_libero_rlds.",
    )
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split="train", filetype_suffix="tfrecord"
    )
    split = tfds.core.SplitInfo(name="train", shard_lengths=lengths, num_bytes=size, filename_template=template)
    info.set_file_format(tfds.core.FileFormat.TFRECORD)
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(folder)


def serialise(features: tfds.features.FeaturesDict, episode: Episode) -> bytes:
    """One tf.train.Example. Discount 1; reward 1 on the last step, which is terminal: demonstrations succeed."""
    last = len(episode.images) - 1
    check_episode(episode)
    steps = [
        {
            "observation": {
                "image": episode.images[t],
                "wrist_image": episode.wrist_images[t],
                "state": np.asarray(episode.states[t], np.float32),
                "joint_state": np.asarray(episode.joint_states[t], np.float32),
            },
            "action": np.asarray(episode.actions[t], np.float32),
            "discount": 1.0,
            "reward": float(t == last),
            "is_first": t == 0,
            "is_last": t == last,
            "is_terminal": t == last,
            "language_instruction": episode.instruction,
        }
        for t in range(len(episode.images))
    ]
    example = {"steps": steps, "episode_metadata": {"file_path": episode.source}}
    record = features.serialize_example(features.encode_example(example))
    return tf.train.Example.FromString(record).SerializeToString(deterministic=True)  # else in any order of names


def check_episode(episode: Episode) -> None:
    """What `read_episodes` would refuse is not written."""
    steps = len(episode.images)
    check(steps > 0, f"an episode without frames from {episode.source}", "at least one step")
    check(bool(episode.instruction.strip()), f"an episode without instruction from {episode.source}", "a sentence")
    for name, rows, width in (
        ("actions", episode.actions, ACTION_DIM),
        ("states", episode.states, PROPRIO_DIM),
        ("joint_states", episode.joint_states, 7),
    ):
        shape = np.shape(rows)
        check(shape == (steps, width), f"{name} of shape {shape} for {steps} frames", f"({steps}, {width})")
        check(bool(np.isfinite(rows).all()), f"{name} with NaN or infinity from {episode.source}", "finite numbers")
    check(len(episode.wrist_images) == steps, f"{len(episode.wrist_images)} wrist frames", f"{steps}")
    for t, image in enumerate((*episode.images, *episode.wrist_images)):
        check_frame(image, t % steps)


def libero_features() -> tfds.features.FeaturesDict:
    """The features of OpenVLA's LIBERO data sets, to the letter: features.json is equal."""
    f = tfds.features
    camera = {"shape": FRAME_SHAPE, "dtype": np.uint8, "encoding_format": "jpeg"}
    steps = {
        "observation": f.FeaturesDict(
            {
                "image": f.Image(**camera, doc="Main camera RGB observation."),
                "wrist_image": f.Image(**camera, doc="Wrist camera RGB observation."),
                "state": f.Tensor(shape=(8,), dtype=np.float32, doc="Robot EEF state (6D pose, 2D gripper)."),
                "joint_state": f.Tensor(shape=(7,), dtype=np.float32, doc="Robot joint angles."),
            }
        ),
        "action": f.Tensor(shape=(ACTION_DIM,), dtype=np.float32, doc="Robot EEF action."),
        "discount": f.Scalar(dtype=np.float32, doc="Discount if provided, default to 1."),
        "reward": f.Scalar(dtype=np.float32, doc="Reward if provided, 1 on final step for demos."),
        "is_first": f.Scalar(dtype=np.bool_, doc="True on first step of the episode."),
        "is_last": f.Scalar(dtype=np.bool_, doc="True on last step of the episode."),
        "is_terminal": f.Scalar(
            dtype=np.bool_, doc="True on last step of the episode if it is a terminal step, True for demos."
        ),
        "language_instruction": f.Text(doc="Language Instruction."),
    }
    metadata = f.FeaturesDict({"file_path": f.Text(doc="Path to the original data file.")})
    return f.FeaturesDict({"steps": f.Dataset(steps), "episode_metadata": metadata})
