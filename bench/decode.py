"""How many actions a second one GPU decodes, against transformers' `generate` at batch 1 on the same weights.

    python bench/decode.py                              # 7B at random weights, bfloat16, one GPU
    python bench/decode.py --preset tiny --device cpu   # a smoke run: shows that it works, not how fast

Everything is measured in one process, one after another: the card's rate at a matrix product of the model's own shape,
the baseline, this project's decoder at several batch sizes, whether a request's tokens depend on who shares its batch,
and what resident adapters cost. Prints a short table last.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spvla.model.kernels.compiled import arithmetic
from spvla.model.linear import named_maps
from spvla.model.lora_bank import LoraBank, RowSlots
from spvla.model.lora_file import LoraFile
from spvla.model.openvla import OpenVLA, with_patches
from spvla.model.transfer import to_device
from spvla.model.vision import NUM_PATCHES
from spvla.model.weights import torch_dtype
from spvla.policies.openvla.decoding import Decoder
from spvla.policies.openvla.images import to_pixel_values
from spvla.policies.openvla.presets import preset
from spvla.policies.openvla.prompt import build_tiny_tokenizer, prompt_ids
from spvla.types import ACTION_DIM

INSTRUCTIONS = (
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "open the middle drawer of the cabinet",
    "put both the cream cheese box and the butter in the basket",
    "turn on the stove",
)
LORA_RANK = 32


@dataclass
class Result:
    """Everything measured; seconds and bytes unless named otherwise."""

    machine: dict[str, str] = field(default_factory=dict)
    matmul_tflops: float = 0.0
    action_tflop: float = 0.0
    floor_actions_per_s: float = 0.0
    generate_actions_per_s: float = 0.0
    generate_tokens_equal: float = 0.0
    batches: list[dict[str, float]] = field(default_factory=list)
    flips_fixed: float | None = None
    flips_own_size: float | None = None
    adapters: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.dtype = torch_dtype(args.dtype)
        self.start_s = time.monotonic()
        self.model = random_model(args.preset, self.device, self.dtype)
        tokenizer = build_tiny_tokenizer()
        rng = np.random.default_rng(0)
        count = max(args.batches)
        self.images = smooth_images(count, rng)
        self.prompts = [prompt_ids(tokenizer, INSTRUCTIONS[i % len(INSTRUCTIONS)]) for i in range(count)]
        self.max_prompt = max(map(len, self.prompts))
        self.row_slots = RowSlots()
        self.result = Result(machine=machine(self.device, args.dtype))
        self.decoders: dict[int, Decoder] = {}

    def log(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start_s:6.1f} s] {text}", flush=True)

    def left_s(self) -> float:
        return self.args.budget_s - (time.monotonic() - self.start_s)

    def timed(self, run: Callable[[], object], repeats: int) -> list[float]:
        """Seconds of each call, the device idle before and after."""
        times = []
        for _ in range(repeats):
            self.sync()
            start = time.perf_counter()
            run()
            self.sync()
            times.append(time.perf_counter() - start)
        return times

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def pixels(self, count: int) -> Tensor:
        """From the host: as a farm's requests arrive."""
        return to_pixel_values(to_device(torch.from_numpy(self.images[:count]), self.device))

    def decoder(self, batch: int) -> Decoder:
        if batch not in self.decoders:
            self.decoders[batch] = Decoder(
                self.model,
                batch_size=batch,
                max_prompt=self.max_prompt,
                row_slots=self.row_slots,
                cuda_graphs=self.graphs,
            )
        return self.decoders[batch]

    @property
    def graphs(self) -> bool:
        return self.device.type == "cuda"

    def matmul(self) -> None:
        """The card's rate at the product that dominates: gate and up of one layer for the largest batch."""
        llm = self.model.config.llm
        tokens = max(self.args.batches) * (NUM_PATCHES + self.max_prompt)
        x = torch.randn(tokens, llm.width, device=self.device, dtype=self.dtype)
        w = torch.randn(2 * llm.mlp_hidden, llm.width, device=self.device, dtype=self.dtype) * llm.width**-0.5
        repeats = 30 if self.graphs else 2
        F.linear(x, w)

        def many() -> None:
            for _ in range(repeats):
                F.linear(x, w)

        seconds = min(self.timed(many, 3)) / repeats
        r = self.result
        r.matmul_tflops = 2 * tokens * w.numel() / seconds / 1e12
        r.action_tflop = action_flop(self.model, statistics.mean(map(len, self.prompts))) / 1e12
        r.floor_actions_per_s = r.matmul_tflops / r.action_tflop
        self.log(f"matmul {r.matmul_tflops:.0f} TFLOP/s, {r.action_tflop:.2f} TFLOP an action")

    def baseline(self) -> None:
        """Towers and projector as they are, then transformers' Llama and `generate` on the very same weights."""
        llama = transformers_llama(self.model)
        ids: list[Tensor] = []

        @torch.inference_mode()
        def one(i: int = 0) -> None:
            pixels = to_pixel_values(torch.from_numpy(self.images[i : i + 1]).to(self.device))
            prompt = torch.tensor([self.prompts[i]], device=self.device)
            embeds = with_patches(self.model.embed(prompt), self.model.patches(pixels))
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=self.device)
            out = llama.generate(
                **{"inputs_embeds": embeds, "attention_mask": mask, "do_sample": False},
                **{"max_new_tokens": ACTION_DIM, "min_new_tokens": ACTION_DIM, "pad_token_id": 32000},
            )
            ids.append(out[0, -ACTION_DIM:].cpu())

        one()
        times = self.timed(one, self.args.repeats)
        self.result.generate_actions_per_s = 1 / statistics.median(times)
        ids.clear()
        for i in range(min(8, len(self.prompts))):
            one(i)
        decoder = self.decoder(1)
        same = []
        for i, theirs in enumerate(ids):
            pixels = to_pixel_values(torch.from_numpy(self.images[i : i + 1]).to(self.device))
            same.append((decoder.decode(pixels, self.prompts[i : i + 1]).ids[0].cpu() == theirs).float().mean().item())
        self.result.generate_tokens_equal = statistics.mean(same)
        self.log(f"generate {self.result.generate_actions_per_s:.2f}/s; {statistics.mean(same):.0%} of tokens equal")

    def speed(self, batch: int) -> None:
        start = time.monotonic()
        if self.graphs:
            torch.cuda.reset_peak_memory_stats()
        decoder = self.decoder(batch)
        prepared_s = time.monotonic() - start
        prompts = self.prompts[:batch]

        def one() -> None:
            decoder.decode(self.pixels(batch), prompts).ids.cpu()

        one()
        times = self.timed(one, self.args.repeats)
        busy_s = statistics.median(self.timed(lambda: self.busy(decoder, prompts), 3)) / self.args.repeats
        self.result.batches.append(
            {
                "batch": batch,
                "actions_per_s": batch / busy_s,
                "latency_ms": 1e3 * statistics.median(times),
                "latency_worst_ms": 1e3 * max(times),
                "prepare_s": prepared_s,
                "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if self.graphs else 0.0,
            }
        )
        self.log(f"batch {batch}: {batch / busy_s:.1f} actions/s, ready after {prepared_s:.0f} s")

    def busy(self, decoder: Decoder, prompts: Sequence[Sequence[int]]) -> None:
        """One batch after another, a second always ready behind the first: as a busy policy actor decodes."""
        ahead = decoder.start(self.pixels(len(prompts)), prompts)
        for _ in range(self.args.repeats - 1):
            behind = decoder.start(self.pixels(len(prompts)), prompts)
            ahead.result()
            ahead = behind
        ahead.result()

    def flips(self) -> None:
        """The same requests in three groupings: how many tokens differ from the first's, in a fixed bucket or not."""
        n = max(self.args.batches)
        rng = np.random.default_rng(1)
        cuts = [sorted(rng.choice(np.arange(1, n), 4, replace=False)) if n > 5 else [n // 2] for _ in range(2)]
        groupings = [[np.arange(n)], np.split(np.arange(n), cuts[0]), np.split(rng.permutation(n), cuts[1])]
        bucket = self.decoder(n)
        fixed = [self.grouped(g, lambda rows: bucket) for g in groupings]
        self.result.flips_fixed = float(np.mean([f != fixed[0] for f in fixed[1:]]))
        self.log(f"flips in a fixed bucket: {self.result.flips_fixed:.4%} of tokens")

        def own_size(rows: np.ndarray) -> Decoder:
            longest = max(len(self.prompts[i]) for i in rows)
            kind = {"batch_size": len(rows), "max_prompt": longest, "row_slots": self.row_slots}
            return Decoder(self.model, **kind, cuda_graphs=False)

        own = [self.grouped(g, own_size) for g in groupings]
        self.result.flips_own_size = float(np.mean([o != own[0] for o in own[1:]]))
        self.log(f"flips at own size: {self.result.flips_own_size:.4%} of tokens")

    def grouped(self, groups: Sequence[np.ndarray], decoder_of: Callable[[np.ndarray], Decoder]) -> np.ndarray:
        """(n, 7) ids, by request."""
        ids = np.zeros((max(self.args.batches), ACTION_DIM), np.int64)
        for rows in groups:
            pixels = to_pixel_values(torch.from_numpy(self.images[rows]).to(self.device))
            ids[rows] = decoder_of(rows).decode(pixels, [self.prompts[i] for i in rows]).ids.cpu().numpy()
        return ids

    def with_adapters(self) -> None:
        """Four resident versions in one batch, against the base alone; and what swapping one in takes."""
        n = max(self.args.batches)
        self.decoders.clear()
        if self.graphs:
            torch.cuda.empty_cache()
        bank = LoraBank(self.model)
        adapter = random_adapter(self.model, LORA_RANK)
        for i in range(4):
            bank.add(f"version {i}", adapter)
        self.sync()
        kind = {"batch_size": n, "max_prompt": self.max_prompt, "row_slots": bank.slots, "cuda_graphs": self.graphs}
        decoder = Decoder(self.model, **kind)
        slots = [i % 5 for i in range(n)]

        def one() -> None:
            decoder.decode(self.pixels(n), self.prompts[:n], slots=slots).ids.cpu()

        one()
        seconds = statistics.median(self.timed(one, self.args.repeats))
        swap_s = min(self.timed(lambda: bank.add("version 0", adapter), 3))
        moved = sum(t.numel() for pair in adapter.factors.values() for t in pair) * self.dtype.itemsize
        self.result.adapters = {
            "versions": 4,
            "actions_per_s": n / seconds,
            "swap_ms": 1e3 * swap_s,
            "swapped_mb": moved / 1e6,
        }
        self.log(f"four versions and the base in one batch: {n / seconds:.1f} actions/s; a swap {1e3 * swap_s:.0f} ms")

    def run(self) -> None:
        batches = sorted(self.args.batches)
        self.attempt("matmul", 5, self.matmul)
        self.attempt(f"batch {batches[-1]}", 40, lambda: self.speed(batches[-1]))
        self.attempt("batch 1", 20, lambda: self.speed(batches[0]))
        self.attempt("baseline", 15, self.baseline)
        self.attempt("flips", 15, self.flips)
        for batch in batches[1:-1]:
            self.attempt(f"batch {batch}", 20, lambda batch=batch: self.speed(batch))
        self.attempt("adapters", 30, self.with_adapters)

    def attempt(self, name: str, needs_s: float, part: Callable[[], None]) -> None:
        """Leaves a part out, saying so, when the time left would not do."""
        if self.left_s() < needs_s:
            self.result.skipped.append(name)
            self.log(f"{name}: skipped, {self.left_s():.0f} s left")
            return
        part()

    def report(self) -> None:
        r = self.result
        r.batches.sort(key=lambda b: b["batch"])
        if self.args.out:
            self.args.out.write_text(json.dumps(asdict(r), indent=2))
        print(f"\n{self.args.preset} {self.args.dtype} on {r.machine['device']}, torch {r.machine['torch']}")
        print(
            f"matrix product {r.matmul_tflops:.0f} TFLOP/s, {r.action_tflop:.2f} TFLOP an action: "
            f"floor {r.floor_actions_per_s:.0f} actions/s"
        )
        print(f"{'':>14}  actions/s  x generate  of floor  latency ms  memory GB")
        base = r.generate_actions_per_s
        print(f"{'generate, 1':>14}  {base:9.2f}  {1:10.1f}  {base / r.floor_actions_per_s:8.1%}")
        for b in r.batches:
            rate = b["actions_per_s"]
            print(
                f"{'batch ' + str(int(b['batch'])):>14}  {rate:9.2f}  {rate / base if base else 0:10.1f}  "
                f"{rate / r.floor_actions_per_s:8.1%}  {b['latency_ms']:10.1f}  {b['memory_gb']:9.1f}"
            )
        if r.adapters:
            print(f"{'4 adapters':>14}  {r.adapters['actions_per_s']:9.2f}  swap {r.adapters['swap_ms']:.0f} ms")
        print(f"flips: fixed bucket {r.flips_fixed}, own size {r.flips_own_size}; skipped: {r.skipped or 'nothing'}")


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> OpenVLA:
    """A preset with random weights made where they stay: unit variance through every map."""
    with torch.device("meta"):
        model = OpenVLA(preset(name)).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for key, p in model.named_parameters():
        if "norm" in key or key.endswith("scale_factor"):
            p.fill_(1)
        elif key.endswith("bias"):
            p.zero_()
        else:
            scale = 1 if p.shape[0] == 1 else p[0].numel() ** -0.5
            p.normal_(0, scale, generator=generator)
    return model


def smooth_images(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 224, 224, 3) uint8: coarse random colours, enlarged, so that requests differ as scenes do."""
    coarse = rng.integers(0, 256, (count, 14, 14, 3), dtype=np.uint8)
    return coarse.repeat(16, 1).repeat(16, 2)


def action_flop(model: OpenVLA, prompt_tokens: float) -> float:
    """Multiplications and additions of one action: every map that runs, on every token it must see, and attention."""
    config = model.config
    vision = 0.0
    for tower in (config.dino, config.siglip):
        tokens = NUM_PATCHES + tower.num_registers + tower.class_token
        block = 4 * tower.width**2 + 2 * tower.width * tower.mlp_hidden
        vision += (tower.depth - 1) * tokens * (2 * block + 4 * tokens * tower.width)
    projector = 2 * NUM_PATCHES * sum(p.numel() for p in model.projector.parameters())
    tokens = NUM_PATCHES + prompt_tokens + ACTION_DIM - 1
    layer = 4 * config.llm.width**2 + 3 * config.llm.width * config.llm.mlp_hidden
    llm = config.llm.depth * tokens * (2 * layer + 2 * tokens * config.llm.width)
    return vision + projector + llm + ACTION_DIM * 2 * config.llm.width * config.llm.vocab_size


def transformers_llama(model: OpenVLA) -> torch.nn.Module:
    """transformers' own Llama around the same tensors: no second copy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llm = model.config.llm
    sizes = {"hidden_size": llm.width, "intermediate_size": llm.mlp_hidden, "vocab_size": llm.vocab_size}
    heads = {"num_attention_heads": llm.num_heads, "num_key_value_heads": llm.num_heads}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=llm.depth, rms_norm_eps=llm.rms_norm_eps, use_cache=True)
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    llama.load_state_dict(model.language_model.state_dict(), assign=True)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config).to(model.device)
    llama.generation_config.eos_token_id = None
    return llama.eval()


def random_adapter(model: OpenVLA, rank: int) -> LoraFile:
    """An adapter as a checkpoint would hold it, on every map."""
    like = {"device": model.device, "dtype": torch.float32}
    factors = {}
    for name, named in named_maps(model).items():
        outputs, inputs = named.shape
        a, b = torch.randn(rank, inputs, **like) / rank, torch.randn(outputs, rank, **like) * inputs**-0.5
        factors[name] = a, b
    return LoraFile(rank=rank, alpha=16, factors=factors)


def machine(device: torch.device, dtype: str) -> dict[str, str]:
    import transformers

    name = arithmetic(device.type, dtype) if device.type == "cuda" else platform.processor() or "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": name, "python": platform.python_version(), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="7b", choices=("7b", "tiny"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default=None, help="by default bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--batches", default="1,8,32,64", help="the largest is used for flips and adapters")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--budget_s", type=float, default=240.0, help="later parts are left out when it runs short")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    args.batches = [int(b) for b in args.batches.split(",")]
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    bench = Bench(args)
    bench.run()
    bench.report()


if __name__ == "__main__":
    main()
