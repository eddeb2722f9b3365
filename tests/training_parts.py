"""A small data set and quick flags, shared by the tests that train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from spvla import runs
from spvla.config import TrainConfig
from spvla.data.index import ensure_index
from spvla.policies.checkpoint import policy_digest
from spvla.policies.openvla.images import encode_jpeg
from spvla.train.prepare import Job, run_id, start_policy
from spvla.train.session import Place
from spvla.train.worker import Report, loop
from spvla.types import Episode

DATASET = "toy_no_noops"


def write_toy_dataset(
    root: Path, episodes: int = 22, steps: int = 6, name: str = DATASET, *, brightest: int = 255
) -> Path:
    """Grey frames whose brightness tells the action: something to learn, in a second. 22 episodes: one is held out.

    `brightest` 1 makes all frames black: the one action is soon learned.
    """
    from spvla.data.rlds import write_dataset

    def episode(i: int) -> Episode:
        rng = np.random.default_rng(i)
        levels = rng.integers(0, brightest, steps)
        images = [encode_jpeg(np.full((256, 256, 3), level, np.uint8)) for level in levels]
        actions = np.tile(levels[:, None] / 127.5 - 1, (1, 7)).astype(np.float32)
        return Episode(
            images=images,
            wrist_images=images,
            states=np.zeros((steps, 8), np.float32),
            joint_states=np.zeros((steps, 7), np.float32),
            actions=actions,
            instruction="follow the light",
            source=f"episode {i}",
        )

    return write_dataset((episode(i) for i in range(episodes)), root, name)


def quick_flags(data: Path, runs_dir: Path, **flags: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "vla_path": "tiny",
            "data_root_dir": data,
            "dataset_name": DATASET,
            "run_root_dir": runs_dir,
            "lora_rank": 4,
            "batch_size": 2,
            "image_aug": False,
            "max_steps": 4,
            "save_steps": 2,
        }
        | flags
    )


def job_of(config: TrainConfig) -> Job:
    """As `train` prepares it, without Ray (the index stands already)."""
    run = config.run_root_dir / run_id(config)
    run.mkdir(parents=True, exist_ok=True)
    stores = ((DATASET, ensure_index(config.data_root_dir, DATASET), 1.0),)
    start = start_policy(config, run)
    digest = policy_digest(start)
    return Job(config=config, run=run, start=start, start_digest=digest, stores=stores, use_gpu=False)


def train_here(config: TrainConfig, report: Report = lambda row, checkpoint: None) -> Path:
    """Trains in this process, with one thread, as a Ray worker does; returns the run's folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        job = job_of(config)
        loop(job, Place(), report)
    finally:
        torch.set_num_threads(threads)
    return job.run


def flags_of(config: TrainConfig) -> list[str]:
    """The same run as a command line."""
    import draccus

    flags = {k: v for k, v in draccus.encode(config).items() if v != draccus.encode(TrainConfig())[k]}
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    newest = runs.latest_checkpoint(run)
    assert newest is not None
    adapter = newest / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else newest / "model.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def when(there: Callable[[], bool], *, timeout_s: float = 120) -> None:
    """Waits for something to be true."""
    import time

    deadline = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
