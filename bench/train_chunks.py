"""Samples a second of one self-play step over chunks, against the least time that its arithmetic takes.

    python bench/train_chunks.py                                             # one H200, 7B at random weights
    python bench/train_chunks.py --preset tiny --device cpu --batch 2 --steps 1   # a smoke test

OpenVLA-OFT's discrete form: two cameras, proprio, chunks of eight; SPIN with LoRA and the projector in full. The floor
is three passes (the policy's forward and backward, the opponent's forward) at the measured rate of a large matrix
product. As in training, the opponent answers several steps at once, and a step's numbers are read later.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle, islice

import numpy as np
import torch
from chunks import chunk_flop
from train_step import BETA, LEARNING_RATE, device_name, matmul_tflops, random_core, random_lora

from spvla.config import StepConfig
from spvla.model.vision import NUM_PATCHES
from spvla.policies.oft.form import OftForm
from spvla.policies.oft.network import OpenVLAOFT
from spvla.train.reference import together
from spvla.train.step import Learner
from spvla.types import PROPRIO_DIM, Batch

FORM = OftForm(cameras=2, proprio=True)
WARM_UPS = 2


def random_batch(size: int, prompt: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 29_000, (size, prompt + FORM.slots + 1))
    ids[:, 0], ids[:, -1], ids[:, prompt - 1] = 1, 2, 29_871
    ids[:, prompt:-1] = rng.integers(31_744, 32_000, (size, FORM.slots))
    return Batch(
        images=rng.integers(0, 256, (size, FORM.cameras, 224, 224, 3), dtype=np.uint8),
        proprio=rng.uniform(-1, 1, (size, PROPRIO_DIM)).astype(np.float32),
        input_ids=ids,
        lengths=np.full(size, ids.shape[1]),
        actions=np.zeros((size, FORM.chunk, 7), np.float32),
        samples=np.arange(size) + size * seed,
    )


def steps_ahead(args: argparse.Namespace) -> int:
    """Steps that the opponent answers at once."""
    return together(args.batch) if args.device == "cuda" else 1


def steps_of(learner: Learner, args: argparse.Namespace) -> Callable[[], list[dict[str, float]]]:
    """One group of steps, and the metrics of the group before."""
    ahead = steps_ahead(args)
    batches, behind = cycle([random_batch(args.batch, args.prompt, seed) for seed in range(2)]), []

    def steps() -> list[dict[str, float]]:
        coming = learner.prepare([[batch] for batch in islice(batches, ahead)])
        under_way = [learner.step(questions) for questions in coming]
        rows = [pending.read() for pending in behind or under_way]
        behind[:] = under_way
        return rows

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="7b", choices=("7b", "tiny"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=30, help="tokens up to the first slot")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="timed groups of steps, after two to warm up")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    model = OpenVLAOFT.around(random_core(args), FORM)
    config = StepConfig(beta=BETA, learning_rate=LEARNING_RATE, compile=on_gpu and not args.eager)
    steps = steps_of(Learner(model, config, policy=random_lora(model, args.rank)), args)
    for _ in range(WARM_UPS):
        steps()
    begin, rows = time.perf_counter(), []
    for _ in range(args.steps):
        rows += steps()
    if on_gpu:
        torch.cuda.synchronize()
    count = args.steps * steps_ahead(args) * args.batch
    rate = count / (time.perf_counter() - begin)
    assert not any(row["skipped"] for row in rows), rows
    tokens = FORM.cameras * NUM_PATCHES + 1 + args.prompt + FORM.slots + 1
    flop, matmul = 3 * chunk_flop(model, tokens), matmul_tflops(args) if on_gpu else float("nan")
    parts = {p: statistics.median(row[p] for row in rows) for p in ("opponent_s", "forward_s", "backward_s")}
    peak = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else float("nan")
    print(f"{args.preset} on {device_name(args)}, batch {args.batch}, {tokens} positions, {peak:.1f} GiB")
    print(
        f"{rate:.2f} samples/s, {rate * flop / 1e12 / matmul:.0%} of the floor ({flop / 1e12:.1f} TFLOP a sample at "
        f"{matmul:.0f} TFLOP/s); " + "  ".join(f"{name} {value:.3f}" for name, value in parts.items())
    )


if __name__ == "__main__":
    main()
