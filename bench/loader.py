"""How many samples a second the loader prepares, in each of its ways and against tf.data on the same cores.

    python bench/loader.py [--cores 2] [--rounds 5] [--seconds 4]
    python bench/loader.py --decoded [--cores 2] [--batch_size 256]      # no TensorFlow: gathering decoded frames

Both read the same data set of 256 x 256 JPEG frames (made here, textured so that a frame has about 27 KB), decode them,
resize them to 224 by Lanczos, augment them (crop, brightness, contrast, saturation, hue) and batch them by 16. Ours
also shuffles exactly and makes the token ids; tf.data shuffles a buffer of 1,000 frames. They take turns, so that a
busy machine slows both.

With `--decoded`: what decoding a picture once takes, and then a batch of decoded pictures with what the device is to
do to them, for one camera and for two with proprio. Prints a table last.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np

from spvla.data.frames import open_frames
from spvla.data.index import FOLDER, finish, index_shard
from spvla.data.layout import find
from spvla.data.loader import Loader
from spvla.data.store import COLUMNS, FrameStore, conclude, write_batches
from spvla.policies.openvla.images import encode_jpeg
from spvla.policies.openvla.prompt import build_tiny_tokenizer
from spvla.types import Episode, Needs

NAME, BATCH = "benchmark", 16


@cache
def frame(number: int) -> bytes:
    """A textured JPEG of about 27 KB; another one for each of 50 numbers."""
    rng = np.random.default_rng(number % 50)
    y, x = np.mgrid[:256, :256]
    smooth = 110 + 60 * np.sin(x / (9 + number % 5)) + 40 * np.cos(y / 23)
    grain = rng.normal(0, 6, (256, 256, 3))
    return encode_jpeg(np.clip(smooth[..., None] + grain, 0, 255).astype(np.uint8))


def episodes(count: int, steps: int) -> Iterator[Episode]:
    rng = np.random.default_rng(0)
    for number in range(count):
        images = [frame((number + t) % 50) for t in range(steps)]
        yield Episode(
            images=images,
            wrist_images=images,
            states=rng.uniform(-1, 1, (steps, 8)).astype(np.float32),
            joint_states=np.zeros((steps, 7), np.float32),
            actions=rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
            instruction="pick up the black bowl on the stove and place it on the plate",
            source=f"{number}",
        )


def index_all(root: Path, name: str) -> FrameStore:
    source, folder = find(root, name), root / name / FOLDER
    folder.mkdir(exist_ok=True)
    for shard in source.shards:
        index_shard(shard, folder, skip_corrupt=False)
    finish(folder, source)
    return FrameStore.open(folder)


def tf_frames(root: Path, cores: int) -> Iterator[np.ndarray]:
    """The original's steps as a tf.data pipeline, one thread a core."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(cores)
    shards = [str(s.path) for s in find(root, NAME).shards]
    spec = {"steps/observation/image": tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)}

    def images(record: tf.Tensor) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(tf.io.parse_single_example(record, spec)["steps/observation/image"])

    def prepare(jpeg: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_image(jpeg, expand_animations=False, dtype=tf.uint8)
        image = tf.image.resize(image, (224, 224), method="lanczos3", antialias=True)
        image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        return augment(tf.image.convert_image_dtype(image, tf.float32))

    def augment(x: tf.Tensor) -> tf.Tensor:
        side = float(np.sqrt(0.9))
        at = tf.random.uniform((), 0, 1 - side)
        x = tf.image.crop_and_resize(x[None], [[at, at, at + side, at + side]], [0], (224, 224))[0]
        x = tf.clip_by_value(x, 0, 1)
        for change in (
            lambda x: tf.image.random_brightness(x, 0.2),
            lambda x: tf.image.random_contrast(x, 0.8, 1.2),
            lambda x: tf.image.random_saturation(x, 0.8, 1.2),
            lambda x: tf.image.random_hue(x, 0.05),
        ):
            x = tf.clip_by_value(change(x), 0, 1)
        return tf.image.convert_image_dtype(x, tf.uint8, saturate=True)

    frames = tf.data.TFRecordDataset(shards).repeat().interleave(images, cycle_length=8)
    batches = frames.shuffle(1000).map(prepare, num_parallel_calls=cores).batch(BATCH).prefetch(4)
    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    return batches.with_options(options).as_numpy_iterator()


def rate(batches: Iterator, seconds: float, batch_size: int = BATCH) -> tuple[float, float]:
    """Samples a second, and CPU milliseconds a sample; what was prepared during another's turn is thrown away first."""
    for _ in range(6):
        next(batches)
    start, cpu_s, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - start), (time.process_time() - cpu_s) / count * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--decoded", action="store_true", help="gather decoded frames instead")
    parser.add_argument("--batch_size", type=int, default=256, help="with --decoded")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    result = gather(args) if args.decoded else against_tf(args)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def gather(args: argparse.Namespace) -> dict[str, float]:
    result: dict[str, float] = {"cores": args.cores, "frame_bytes": len(frame(0))}
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(Path(folder), episodes(40, 100))
        for cameras in (tuple(COLUMNS)[:1], tuple(COLUMNS)):
            start, cpu_s = time.perf_counter(), time.process_time()
            frames = open_frames([store], cameras, "decoded", threads=args.cores)
            ms = (time.process_time() - cpu_s) * 1e3 / len(store)  # the first camera's are there already
            wall_ms = (time.perf_counter() - start) * 1e3 / len(store)
            print(f"{len(cameras)} cameras  decoding {ms:.2f} CPU ms, {wall_ms:.2f} ms a picture")
            result |= {f"decode_cpu_ms_per_picture_{len(cameras)}": ms}
            needs = Needs(cameras=cameras, proprio=len(cameras) > 1)
            kind: dict = {"batch_size": args.batch_size, "seed": 0, "image_aug": True, "on_device": True}
            loader = Loader([store], build_tiny_tokenizer(), needs=needs, frames=frames, workers=args.cores, **kind)
            batches = iter(loader)
            samples_s, ms = rate(batches, args.seconds, args.batch_size)
            batches.close()  # type: ignore[attr-defined]
            print(f"{len(cameras)} cameras  {samples_s:6.0f} samples/s  {ms:5.3f} CPU ms a sample")
            result |= {f"samples_per_s_{len(cameras)}": samples_s, f"cpu_ms_per_sample_{len(cameras)}": ms}
    return result


def store_of(root: Path, source: Iterator[Episode]) -> FrameStore:
    """A store of one file, without a TFDS data set behind it."""
    path = root / "episodes.arrow"
    lengths = write_batches(path, source)
    entry = {"file": path.name, "bytes": path.stat().st_size, "split": "train", "episodes": len(lengths)}
    digest = os.urandom(16).hex()  # nobody else's decoded frames
    conclude(root, NAME, [entry | {"frames": sum(lengths), "sha256": digest}], recorded=True)
    return FrameStore.open(root)


def against_tf(args: argparse.Namespace) -> dict[str, float]:
    from spvla.data.rlds import write_dataset

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_dataset(episodes(20, 100), root, NAME)
        store = index_all(root, NAME)
        loader = Loader([store], build_tiny_tokenizer(), batch_size=BATCH, seed=0, image_aug=True, workers=args.cores)
        ours, theirs = iter(loader), tf_frames(root, args.cores)
        rate(ours, 1), rate(theirs, 1)  # compile and fill
        rounds = [(rate(ours, args.seconds), rate(theirs, args.seconds)) for _ in range(args.rounds)]
        ours.close()
    (ours_s, ours_ms), (theirs_s, theirs_ms) = (np.median([r[i] for r in rounds], axis=0).tolist() for i in (0, 1))
    result = {
        "cores": args.cores,
        "frame_bytes": len(frame(0)),
        "spvla_frames_per_s": ours_s,
        "tfdata_frames_per_s": theirs_s,
        "spvla_cpu_ms_per_frame": ours_ms,
        "tfdata_cpu_ms_per_frame": theirs_ms,
        "ratio": median(a[0] / b[0] for a, b in rounds),
    }
    print(f"{args.cores} cores, {args.rounds} rounds in turn, JPEG of {result['frame_bytes']} bytes")
    print(f"spvla    {ours_s:6.0f} augmented frames/s  {ours_ms:5.2f} CPU ms a frame")
    print(f"tf.data  {theirs_s:6.0f}                     {theirs_ms:5.2f}")
    print(f"ratio    {result['ratio']:6.2f}  (median of the rounds' own)")
    return result


if __name__ == "__main__":
    main()
