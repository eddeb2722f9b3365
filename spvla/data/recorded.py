"""Episodes recorded here -> an indexed store at once, and from there an RLDS data set for who wants one.

TensorFlow is imported by the export alone.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from spvla.config import ExportConfig
from spvla.data.index import FOLDER, is_recorded, writing
from spvla.data.store import RECORDING, FrameStore, conclude, write_batches
from spvla.errors import DatasetError, UserError
from spvla.files import expanded, new_folder, require_writable, safe_name
from spvla.types import Episode

SHARD_EPISODES = 32  # about 200 MB
THREADS = 8


def write_index(
    names: Sequence[str],
    read: Callable[[str], Episode],
    data_root_dir: Path,
    dataset_name: str,
    *,
    starts: str | None = None,
) -> Path:
    """Writes DATA_ROOT/NAME/index from the episodes of these names; nothing is there before all of it is.

    They are ordered by the digest of their names, so that the last 5% are a fair sample and the order in which parallel
    workers deliver does not matter. Raises DatasetError on no episode or a full disk.
    """
    folder = data_root_dir / safe_name(dataset_name, what="dataset_name") / FOLDER
    if not names:
        raise DatasetError(f"no episodes for {folder}", expected="at least one", remedy="Record some that succeed.")
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    groups = [list(group) for group in np.array_split(ordered, -(-len(ordered) // SHARD_EPISODES))]

    def write_shard(number: int) -> dict[str, Any]:
        path = new / f"{dataset_name}-train-{number:05d}-of-{len(groups):05d}.arrow"
        lengths = write_batches(path, (read(str(name)) for name in groups[number]))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        counts = {"episodes": len(lengths), "frames": sum(lengths)}
        return {"file": path.name, "bytes": path.stat().st_size, "split": "train", "sha256": digest} | counts

    with writing(folder), new_folder(folder) as new, ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        entries = list(pool.map(write_shard, range(len(groups))))
        conclude(new, dataset_name, entries, starts=starts, recorded=True)
    return folder


def export(config: ExportConfig) -> None:
    """`spvla export`: writes OUT/NAME/1.0.0 as TFDS would, episodes in the store's order, or a LeRobotDataset.

    Raises UserError.
    """
    root = expanded(config.data_root_dir, flag="--data_root_dir")
    name = safe_name(config.dataset_name, what="--dataset_name")
    if config.format == "lerobot":
        export_lerobot(root, name, require_writable(config.out or root, flag="--out"))
        return
    if not is_recorded(root / name / FOLDER):
        raise UserError(
            f"{root / name} holds no data set that was recorded here",
            expected="one that spvla collect or spvla regenerate wrote",
            remedy="Correct --dataset_name or --data_root_dir; a downloaded data set is in that form already.",
        )
    store = FrameStore.open(root / name / FOLDER)
    out = require_writable(config.out or root, flag="--out")
    from spvla.data.rlds import write_dataset  # TensorFlow only now: takes seconds to import

    episodes = (store.episode(number) for number in range(len(store.episode_lengths)))
    folder = write_dataset(episodes, out, name, in_order=True)
    if out != root and (root / name / RECORDING).exists():
        shutil.copyfile(root / name / RECORDING, out / name / RECORDING)
    print(f"export  {folder}: {len(store.episode_lengths)} episodes, {len(store)} frames")


def export_lerobot(root: Path, name: str, out: Path) -> None:
    """Any indexed data set -> OUT/NAME, or OUT/NAME_lerobot where the data set itself lies there."""
    from spvla.data import lerobot, lerobot_export  # pandas only now

    store = FrameStore.open(root / name / FOLDER)
    folder = out / (f"{name}_lerobot" if out == root else name)
    if folder.exists() and not lerobot.is_lerobot(folder):
        raise UserError(
            f"{folder} exists and is no LeRobotDataset",
            expected="a new folder, or an older export",
            remedy="Give another --out.",
        )
    lerobot_export.export(store, folder)
    print(f"export  {folder}: {len(store.episode_lengths)} episodes, {len(store)} frames")
