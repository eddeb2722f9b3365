"""Samples a second of learning from nothing: behaviour cloning of every weight, on one device.

    python bench/train_small.py                                                   # one H200, preset "small"
    python bench/train_small.py --preset small-oft                                # both cameras, proprio, chunks
    python bench/train_small.py --preset tiny --device cpu --batch 2 --steps 1    # a smoke test

A step is all that training does with a batch that stands in (pinned) host memory: the copy to the device, pixel values,
augmentation where it is done on the device, forward, backward, clipping, AdamW, and numbers that are read a step later.
Images are noise; prompts are as long as LIBERO's. What the loader needs is measured by bench/loader.py.
"""

import argparse
import json
import statistics
import time
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from spvla.config import StepConfig
from spvla.policies.checkpoint import resolve
from spvla.policies.networks import load_network
from spvla.policies.openvla.images import draw_augmentation
from spvla.policies.presets import PRESETS
from spvla.train.step import Learner, Pending
from spvla.types import ACTION_DIM, IMAGE_SIZE, PROPRIO_DIM, Batch, Needs

PROMPT = 24  # tokens before the action; LIBERO's prompts have 19 to 33
PARTS = ("data_s", "forward_s", "backward_s")
WARM_UP = 3  # steps: the first compile


def main() -> None:
    args = arguments()
    row = measure(args)
    print(json.dumps(row, indent=2))
    if args.out:
        args.out.write_text(json.dumps(row, indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=PRESETS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30, help="timed")
    parser.add_argument("--loss_columns", default="action", choices=("action", "all"))
    parser.add_argument("--no_augmentation", action="store_true")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--profile", action="store_true", help="print the kernels of three steps")
    parser.add_argument("--out", type=Path, help="JSON")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, object]:
    learner = new_learner(args)
    batches = cycle([random_batch(args, learner.family.needs, seed) for seed in range(2)])
    start_s = time.perf_counter()
    steps(learner, batches, WARM_UP)
    warm_up_s = time.perf_counter() - start_s
    if args.profile:
        profile(learner, batches)
    start_s = time.perf_counter()
    rows = steps(learner, batches, args.steps)
    step_s = (time.perf_counter() - start_s) / args.steps
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        **{"preset": args.preset, "batch": args.batch, "augmented": not args.no_augmentation},
        **{"compiled": not args.eager and args.device == "cuda", "trained_numbers": len(learner.policy.master)},
        **{"samples_per_s": args.batch / step_s, "step_ms": 1e3 * step_s, "warm_up_s": warm_up_s},
        **{part: statistics.median(row[part] for row in rows) for part in PARTS},
        "memory_gib": rows[-1]["memory_gib"],
        "last_loss": rows[-1]["train_loss"],
    }


def new_learner(args: argparse.Namespace) -> Learner:
    on_gpu = args.device == "cuda"
    model = load_network(resolve(args.preset), device=args.device, dtype="bfloat16" if on_gpu else "float32")
    config = StepConfig(
        objective="sft",
        use_lora=False,
        loss_columns=args.loss_columns,
        learning_rate=1e-3,
        **{"adam_beta2": 0.95, "weight_decay": 0.05, "weight_decay_on": "matrices", "max_grad_norm": 1.0},
        **{"warmup_steps": 500, "lr_schedule": "cosine", "max_steps": 10_000},
        compile=on_gpu and not args.eager,
    )
    return Learner(model, config)


def steps(learner: Learner, batches: "cycle[Batch]", count: int) -> list[dict[str, float]]:
    """Each step's numbers are read when the next has been started."""
    rows: list[dict[str, float]] = []
    pending: Pending | None = None
    for _ in range(count):
        (micro_batches,) = learner.prepare([[next(batches)]])
        started = learner.step(micro_batches)
        if pending is not None:
            rows.append(pending.read())
        pending = started
    assert pending is not None
    return [*rows, pending.read()]


def random_batch(args: argparse.Namespace, needs: Needs, seed: int) -> Batch:
    rng, size, tokens = np.random.default_rng(seed), args.batch, needs.chunk * ACTION_DIM
    ids = np.full((size, PROMPT + tokens + 1), 20_000)
    ids[:, 0], ids[:, PROMPT - 1], ids[:, -1] = 1, 29_871, 2
    ids[:, PROMPT:-1] = rng.integers(31_744, 32_000, (size, tokens))
    shape = (size, len(needs.cameras))
    images = torch.empty((*shape, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, pin_memory=args.device == "cuda")
    images.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return Batch(
        images=images.numpy(),
        augmentation=None if args.no_augmentation else augmentations(shape, rng),
        proprio=rng.uniform(-1, 1, (size, PROPRIO_DIM)).astype(np.float32) if needs.proprio else None,
        input_ids=ids,
        lengths=np.full(size, ids.shape[1]),
        actions=np.zeros((size, needs.chunk, ACTION_DIM), np.float32),
        samples=np.arange(size),
    )


def augmentations(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(B, C, 6) float32."""
    rows = [draw_augmentation(rng, diagonal=False).row() for _ in range(shape[0] * shape[1])]
    return np.reshape(rows, (*shape, 6))


def profile(learner: Learner, batches: "cycle[Batch]") -> None:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        steps(learner, batches, 3)
    print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=80))


if __name__ == "__main__":
    main()
