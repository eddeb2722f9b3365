"""How many chunks a second one GPU answers with, against the least time that its arithmetic takes.

    python bench/chunks.py                                          # 7B at random weights, bfloat16, one GPU
    python bench/chunks.py --head l1
    python bench/chunks.py --preset tiny --device cpu --batches 1,2 # a smoke run: shows that it works, not how fast

Two cameras, proprio, chunks of eight. The floor is the matrix products and attention of a pass at the rate that the
card reaches at a product of the model's own shape, measured first. Also: whether a chunk depends on who shares its
batch, in a fixed bucket. Prints a short table last.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from decode import INSTRUCTIONS, machine, random_model, smooth_images

from spvla.model.lora_bank import RowSlots
from spvla.model.transfer import AsyncHostCopy
from spvla.model.vision import NUM_PATCHES
from spvla.model.weights import torch_dtype
from spvla.policies.oft.decoding import ChunkDecoder
from spvla.policies.oft.form import OftForm
from spvla.policies.oft.network import OpenVLAOFT
from spvla.policies.openvla.prompt import build_tiny_tokenizer, prompt_ids
from spvla.types import PROPRIO_DIM


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.form = OftForm(cameras=2, proprio=True, head=args.head)
        plain = random_model(args.preset, self.device, torch_dtype(args.dtype))
        self.model = OpenVLAOFT.around(plain, self.form).eval().requires_grad_(False)
        tokenizer, count = build_tiny_tokenizer(), max(args.batches)
        rng = np.random.default_rng(0)
        self.prompts = [prompt_ids(tokenizer, INSTRUCTIONS[i % len(INSTRUCTIONS)]) for i in range(count)]
        self.images = smooth_images(2 * count, rng).reshape(count, 2, 224, 224, 3)
        self.proprio = rng.uniform(-1, 1, (count, PROPRIO_DIM)).astype(np.float32)

    @property
    def tokens(self) -> int:
        """Positions of the longest prompt's pass, to which all are padded."""
        return self.form.cameras * NUM_PATCHES + 1 + max(map(len, self.prompts)) + self.form.slots + 1

    def decoder(self, batch: int) -> ChunkDecoder:
        longest = max(map(len, self.prompts))
        return ChunkDecoder(self.model, batch_size=batch, max_prompt=longest, row_slots=RowSlots())

    def start(self, decoder: ChunkDecoder, rows: np.ndarray) -> AsyncHostCopy:
        prompts = [self.prompts[i] for i in rows]
        return decoder.start(self.images[rows], prompts, proprio=self.proprio[rows], slots=[0] * len(rows))

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """The fastest of three rounds of so many calls, for one call."""
        rounds = []
        for _ in range(3):
            self.sync()
            begin = time.perf_counter()
            for _ in range(repeats):
                run()
            self.sync()
            rounds.append((time.perf_counter() - begin) / repeats)
        return min(rounds)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def matmul_flops(self) -> float:
        """The card's rate at gate and up of one layer for the largest batch."""
        llm, dtype = self.model.config.llm, torch_dtype(self.args.dtype)
        x = torch.randn(max(self.args.batches) * self.tokens, llm.width, device=self.device, dtype=dtype)
        w = torch.randn(2 * llm.mlp_hidden, llm.width, device=self.device, dtype=dtype)
        return 2 * len(x) * w.numel() / self.seconds(lambda: F.linear(x, w), self.args.repeats)

    def speed(self, batch: int) -> tuple[float, float]:
        """(chunks a second with a second batch always ready behind the first, seconds of one alone)."""
        decoder, rows = self.decoder(batch), np.arange(batch)
        alone = []
        for _ in range(self.args.repeats):
            begin = time.perf_counter()
            self.start(decoder, rows).read()
            alone.append(time.perf_counter() - begin)
        ahead = [self.start(decoder, rows)]

        def one() -> None:
            ahead.append(self.start(decoder, rows))
            ahead.pop(0).read()

        return batch / self.seconds(one, self.args.repeats), statistics.median(alone)

    def flips(self) -> float:
        """The share of numbers that differ when the same requests are grouped otherwise, in one bucket."""
        count, rng = max(self.args.batches), np.random.default_rng(1)
        decoder, order = self.decoder(count), rng.permutation(count)
        whole = self.start(decoder, np.arange(count)).read()[0].numpy().copy()
        cuts = sorted(rng.choice(np.arange(1, count), min(4, count - 1), replace=False))
        parts = [self.start(decoder, rows).read()[0].numpy().copy() for rows in np.split(order, cuts)]
        return float(np.mean(np.concatenate(parts) != whole[order]))

    def run(self) -> None:
        rate = self.matmul_flops()
        floor = rate / chunk_flop(self.model, self.tokens)
        print(f"{self.args.preset} {self.args.head} {self.args.dtype} on {machine(self.device, self.args.dtype)}")
        print(
            f"matrix product {rate / 1e12:.0f} TFLOP/s, {chunk_flop(self.model, self.tokens) / 1e12:.2f} TFLOP a chunk "
            f"of {self.tokens} positions: floor {floor:.1f} chunks/s"
        )
        print(f"{'batch':>6}  chunks/s  of floor  latency ms", flush=True)
        for batch in self.args.batches:
            chunks, alone = self.speed(batch)
            print(f"{batch:6}  {chunks:8.2f}  {chunks / floor:8.1%}  {1e3 * alone:10.1f}", flush=True)
        print(f"differing in a fixed bucket: {self.flips():.4%}")


def chunk_flop(model: OpenVLAOFT, tokens: int) -> float:
    """Multiplications and additions of one pass: every map that runs, on every position it must see, and attention."""
    config, form = model.config, model.form
    vision = 0.0
    for tower in (config.dino, config.siglip):
        seen = NUM_PATCHES + tower.num_registers + tower.class_token
        block = 4 * tower.width**2 + 2 * tower.width * tower.mlp_hidden
        vision += (tower.depth - 1) * seen * (2 * block + 4 * seen * tower.width)
    vision += 2 * NUM_PATCHES * sum(p.numel() for p in model.projector.parameters())
    llm = config.llm
    attention, rest = 4 * llm.width**2, 3 * llm.width * llm.mlp_hidden
    whole = (llm.depth - 1) * tokens * 2 * (attention + rest)
    last = 2 * (
        3 * tokens * llm.width**2 + form.slots * (llm.width**2 + rest)
    )  # keys of all, the rest where it is read
    scores = 4 * llm.width * tokens * ((llm.depth - 1) * tokens + form.slots)
    head = model.action_head
    answer = form.slots * llm.width * llm.vocab_size if head is None else sum(p.numel() for p in head.parameters()) * 8
    return form.cameras * vision + whole + last + scores + 2 * answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="7b", choices=("7b", "small", "tiny"))
    parser.add_argument("--head", default="discrete", choices=("discrete", "l1"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default=None, help="by default bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--batches", default="1,8,32,64", help="the last is used for the floor and for differences")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    args.batches = [int(b) for b in args.batches.split(",")]
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    Bench(args).run()


if __name__ == "__main__":
    main()
