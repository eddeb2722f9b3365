"""Samples a second of one self-play step, in four ways, on one GPU.

    python bench/train_step.py                               # one H200, OpenVLA 7B at random weights: 5 minutes
    python bench/train_step.py --preset tiny --device cpu --batch 2 --steps 1    # a smoke test, one minute

a  the fork's step: a second copy of the model as opponent, each model's own argmax, logits at every position
b  the textbook SPIN step: generate, then both sequences through policy and opponent; at batch 8, since 20 does not fit
c  ours: the opponent's answers decoded afresh, both actions scored over one shared prefix
d  ours: the opponent's reply known from an earlier epoch

As in training, c and d have the opponent answer several steps at once, and read a step's numbers later: the device
always has work. Rates are those of all steps, one after another; parts are medians.

a and b are made as the fork is: transformers' Llama, peft's adapters, autocast.

Ways run in processes of their own (c and d share one). The floor of a, b and c is three passes through every weight
(the policy's forward and backward, frozen weights needing no gradient, and the opponent's forward) at the measured rate
of a large matrix product; of d, two.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spvla.config import StepConfig
from spvla.model.lora_file import LoraFile, fresh_lora
from spvla.model.openvla import OpenVLA, with_patches
from spvla.model.vision import NUM_PATCHES
from spvla.policies.openvla.presets import preset
from spvla.train.losses import greedy_logps, spin_loss, token_logps
from spvla.train.network import Network
from spvla.train.reference import together
from spvla.train.reference_store import ReferenceStore
from spvla.train.scoring import FED, REAL_ROWS, score_pair, to_inputs
from spvla.train.settings import ALLOCATOR
from spvla.train.step import Learner
from spvla.types import ACTION_DIM, Batch

BETA, LEARNING_RATE = 0.1, 1e-5
BATCHES = 2  # distinct ones, taken in turn


def main() -> None:
    args = arguments()
    if args.way:
        print(json.dumps(measure(args)))
        return
    rate = matmul_tflops(args) if args.device == "cuda" else float("nan")
    results = {"device": device_name(args), "torch": torch.__version__, "matmul_tflops": rate, "ways": {}}
    for ways in args.ways.split(","):
        found = in_process(ways)
        results["ways"] |= found
        for way, row in found.items():
            show(way, row, rate)
    compare(results["ways"])
    if args.out:
        args.out.write_text(json.dumps(results, indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="7b", choices=("7b", "tiny"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--textbook_batch", type=int, default=8, help="batch of b")
    parser.add_argument("--text", type=int, default=38, help="text tokens of a sample")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="timed, after two to warm up; of c and d, groups")
    parser.add_argument("--ways", default="cd,a,b", help="what to run; letters of one process stand together")
    parser.add_argument("--eager", action="store_true", help="c and d without torch.compile")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one group of steps of c")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # this process measures it
    return parser.parse_args()


def in_process(ways: str) -> dict[str, dict]:
    """Runs this script again for some ways; its last line is their numbers."""
    command = [sys.executable, __file__, *sys.argv[1:], "--way", ways]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**ALLOCATOR, **os.environ})
    if done.returncode:
        return {way: {"error": f"exit {done.returncode}"} for way in ways}
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict[str, dict]:
    model = random_core(args)
    if args.way == "a":
        return {"a": timed(args, fork_step(args, model), args.batch, passes=3, model=model)}
    if args.way == "b":
        return {"b": timed(args, textbook_step(args, model), args.textbook_batch, passes=3, model=model)}
    adapter = random_lora(model, args.rank)
    compiled = args.device == "cuda" and not args.eager
    config = StepConfig(beta=BETA, learning_rate=LEARNING_RATE, compile=compiled)
    agreement = agree(args, model)
    learner, ahead = Learner(model, config, policy=adapter), together(args.batch)
    steps = our_steps(args, learner, ahead)
    rows = {"c": timed(args, steps, args.batch, passes=3, model=model, count=ahead) | agreement}
    if args.profile:
        profile(steps)
    if "d" in args.way:
        with tempfile.TemporaryDirectory() as folder:
            learner.reference.store = ReferenceStore(
                Path(folder) / "answers.bin", num_samples=args.batch * BATCHES, key=""
            )
            rows["d"] = timed(args, steps, args.batch, passes=2, model=model, count=ahead)
    return rows


def timed(
    args: argparse.Namespace,
    step: Callable[[], dict[str, float]],
    batch: int,
    *,
    passes: int,
    model: OpenVLA,
    count: int = 1,
) -> dict[str, float]:
    """Mean seconds of a step, one after another, and what follows. `passes` through all weights are its floor.

    `step` takes `count` steps and returns the means of their parts.
    """
    warm_s = time.perf_counter()
    for _ in range(BATCHES):
        step()
    warm_s = time.perf_counter() - warm_s
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    parts, start = [], time.perf_counter()
    for _ in range(args.steps):
        parts.append(step())
    if args.device == "cuda":
        torch.cuda.synchronize()
    step_s = (time.perf_counter() - start) / (args.steps * count)
    memory = torch.cuda.max_memory_reserved() / 2**30 if args.device == "cuda" else float("nan")
    shown = {k: statistics.median(p[k] for p in parts) for k in parts[0]}
    return {
        "samples_per_s": batch / step_s,
        "step_s": step_s,
        "batch": batch,
        "peak_gib": memory,
        "warm_up_s": warm_s,
        "floor_tflop_per_sample": passes * forward_flop(model, args.text) / 1e12,
        **shown,
    }


def our_steps(args: argparse.Namespace, learner: Learner, ahead: int) -> Callable[[], dict[str, float]]:
    """Numbers are read one group of steps behind: the device always has work, as in training."""
    batches, behind = stream(args, args.batch), []

    def steps() -> dict[str, float]:
        coming = learner.prepare([[batch] for batch in islice(batches, ahead)])
        under_way = [learner.step(batches) for batches in coming]
        rows = [pending.read() for pending in behind or under_way]
        behind[:] = under_way
        assert not any(row["skipped"] for row in rows), rows
        parts = ("data_s", "opponent_s", "forward_s", "backward_s")
        return {part: statistics.mean(row[part] for row in rows) for part in parts}

    return steps


def fork_step(args: argparse.Namespace, core: OpenVLA) -> Callable[[], dict[str, float]]:
    """Two models; log-probs averaged over the seven tokens; cross entropy from the same logits."""
    policy, opponent = with_peft(core, args.rank), AsTheFork(random_core(args))
    optimizer, batches = adamw(policy), stream(args, args.batch)

    def step() -> dict[str, float]:
        x = to_inputs(next(batches), args.device)
        with autocast(args):
            logits = policy(x.pixels, x.text)
            with torch.no_grad():
                judged = opponent(x.pixels, x.text)
        rows = slice(NUM_PATCHES + args.text - 1 - REAL_ROWS, None)  # all samples have one length
        (real, own), (their_real, their_own) = (
            (token_logps(y, x.real).mean(-1), greedy_logps(y).mean(-1))
            for y in (logits[:, rows][:, :ACTION_DIM], judged[:, rows][:, :ACTION_DIM])
        )
        cross_entropy = F.cross_entropy(logits[:, rows].float().flatten(0, 1), x.targets.flatten())
        loss = spin_loss(real, own, their_real, their_own, beta=0.5, eta=0.01).loss.mean() + cross_entropy
        return update(loss, optimizer)

    return step


def textbook_step(args: argparse.Namespace, core: OpenVLA) -> Callable[[], dict[str, float]]:
    """The opponent is the policy without its adapter; transformers generates."""
    policy = with_peft(core, args.rank)
    optimizer, batches = adamw(policy), stream(args, args.textbook_batch)

    def step() -> dict[str, float]:
        x = to_inputs(next(batches), args.device)
        start = int(x.start[0])
        with torch.no_grad(), policy.disable_adapter(), autocast(args):
            base = policy.get_base_model()
            prompt = base.embed(x.pixels, x.text[:, :start]).to(core.dtype)
            generated = base.language_model.generate(
                inputs_embeds=prompt,
                attention_mask=torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device),
                max_new_tokens=ACTION_DIM,
                min_new_tokens=ACTION_DIM,
                do_sample=False,
                pad_token_id=0,
            )
        text = torch.cat((x.text, torch.cat((x.text[:, :start], generated, x.text[:, start + ACTION_DIM :]), 1)))
        pixels, ids = x.pixels.repeat(2, 1, 1, 1), torch.cat((x.real, generated))
        with autocast(args):
            logits = policy(pixels, text)
            with torch.no_grad(), policy.disable_adapter():
                judged = policy(pixels, text)
        rows = slice(NUM_PATCHES + start - 1, NUM_PATCHES + start - 1 + ACTION_DIM)
        (real, gen), (their_real, their_gen) = (token_logps(y[:, rows], ids).sum(-1).chunk(2) for y in (logits, judged))
        return update(spin_loss(real, gen, their_real, their_gen, beta=BETA).loss.mean(), optimizer)

    return step


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert torch.isfinite(loss), loss
    return {}


def adamw(policy: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=LEARNING_RATE)


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


class AsTheFork(nn.Module):
    """OpenVLA with transformers' Llama, over the memory of `core`."""

    def __init__(self, core: OpenVLA) -> None:
        super().__init__()
        self.vision_backbone, self.projector = core.vision_backbone, core.projector
        self.language_model = as_transformers(core)

    def embed(self, pixels: Tensor, text: Tensor) -> Tensor:
        patches = self.projector(self.vision_backbone(pixels.to(self.language_model.dtype)))
        return with_patches(self.language_model.get_input_embeddings()(text), patches)

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Logits at every position."""
        return self.language_model(inputs_embeds=self.embed(pixels, text), use_cache=False).logits


def with_peft(core: OpenVLA, rank: int) -> nn.Module:
    """Float32 adapters on every linear map, B not zero."""
    from peft import LoraConfig, get_peft_model

    model = AsTheFork(core)
    targets = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    config = LoraConfig(r=rank, lora_alpha=min(rank, 16), target_modules=targets, init_lora_weights="gaussian")
    policy = get_peft_model(model, config)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 1e-3)
    return policy


def as_transformers(core: OpenVLA) -> nn.Module:
    """The language model as transformers' own, its maps parts of the same memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llm = core.config.llm
    config = LlamaConfig(
        vocab_size=llm.vocab_size,
        hidden_size=llm.width,
        intermediate_size=llm.mlp_hidden,
        num_hidden_layers=llm.depth,
        num_attention_heads=llm.num_heads,
        rms_norm_eps=llm.rms_norm_eps,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(core.language_model.state_dict(), assign=True)
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config=config).to(core.device)  # has no weights in a checkpoint
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def agree(args: argparse.Namespace, model: OpenVLA) -> dict[str, float]:
    """Largest difference in log-prob between the shared-prefix pass and two plain ones through the same model."""
    batch = next(stream(args, 2))
    x = to_inputs(batch, args.device)
    generated = x.real.flip(0)
    with torch.no_grad():
        pair = score_pair(Network(model=model), x, generated)
        ours = torch.stack((token_logps(pair.real[:, :ACTION_DIM], x.real), token_logps(pair.generated, generated)))
        start = int(x.start[0])
        rows = slice(NUM_PATCHES + start - 1, NUM_PATCHES + start - 1 + ACTION_DIM)
        plain = []
        for ids in (x.real, generated):
            text = torch.cat((x.text[:, :start], ids, x.text[:, start + ACTION_DIM :]), 1)
            plain.append(token_logps(model(x.pixels, text).logits[:, rows], ids))
    return {"largest_logp_difference": (ours - torch.stack(plain)).abs().max().item()}


def random_core(args: argparse.Namespace) -> OpenVLA:
    """Random weights made on the device: bfloat16 on a GPU."""
    with torch.device("meta"):
        model = OpenVLA(preset(args.preset))
    model = model.to(torch.bfloat16 if args.device == "cuda" else torch.float32).to_empty(device=args.device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif "norm" in name or name.endswith("scale_factor"):
                p.fill_(1.0)
            else:
                p.normal_(0, 0.02 if "lm_head" in name else p[0].numel() ** -0.5)
    return model.requires_grad_(False)


def random_lora(model: OpenVLA, rank: int) -> LoraFile:
    """B is not zero: matrix products of zeros are quicker than real ones."""
    fresh, generator = fresh_lora(model, rank=rank), torch.Generator().manual_seed(1)
    factors = {name: (a, torch.randn(b.shape, generator=generator) * 1e-3) for name, (a, b) in fresh.factors.items()}
    return replace(fresh, factors=factors)


def stream(args: argparse.Namespace, size: int) -> Iterator[Batch]:
    return cycle([random_batch(size, args.text, seed) for seed in range(BATCHES)])


def random_batch(size: int, text: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 29_000, (size, text))
    ids[:, 0], ids[:, -1], ids[:, -REAL_ROWS - 1] = 1, 2, 29871
    ids[:, -REAL_ROWS:-1] = rng.integers(31_744, 32_000, (size, ACTION_DIM))
    return Batch(
        images=rng.integers(0, 256, (size, 1, 224, 224, 3), dtype=np.uint8),
        input_ids=ids,
        lengths=np.full(size, text),
        actions=np.zeros((size, 1, ACTION_DIM), np.float32),
        samples=np.arange(size) + size * seed,
    )


def forward_flop(model: OpenVLA, text: int) -> float:
    """Operations of one sample's forward pass through every weight in use: twice weights x rows, attention left out."""
    config, rows = model.config, NUM_PATCHES + text - 1 + FED
    towers = sum(
        (t.depth - 1) * (4 * t.width + 2 * t.mlp_hidden) * t.width * (NUM_PATCHES + t.num_registers + t.class_token)
        for t in (config.dino, config.siglip)
    )
    projector = sum(p.numel() for n, p in model.projector.named_parameters() if "lora" not in n) * NUM_PATCHES
    llm = config.llm
    layers = llm.depth * (4 * llm.width + 3 * llm.mlp_hidden) * llm.width * rows
    return 2.0 * (towers + projector + layers + llm.width * llm.vocab_size * (REAL_ROWS + FED))


def matmul_tflops(args: argparse.Namespace, side: int = 8192) -> float:
    a, b = (torch.randn(side, side, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 4)
    return 2 * side**3 / statistics.median(seconds) / 1e12


def profile(step: Callable[[], dict[str, float]]) -> None:
    """The kernels of one call, the longest first, on stderr."""
    step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as p:
        step()
        torch.cuda.synchronize()
    print(
        p.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90), file=sys.stderr
    )


def device_name(args: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if args.device == "cuda" else "cpu"


def show(way: str, row: dict, rate: float) -> None:
    if "error" in row:
        print(f"{way}  {row['error']}", flush=True)
        return
    share = row["samples_per_s"] * row["floor_tflop_per_sample"] / rate
    parts = "  ".join(f"{k} {row[k]:.3f}" for k in ("data_s", "opponent_s", "forward_s", "backward_s") if k in row)
    print(
        f"{way}  {row['samples_per_s']:6.1f} samples/s  batch {row['batch']}  {row['peak_gib']:.1f} GiB  "
        f"{share:.0%} of the floor ({row['floor_tflop_per_sample']:.1f} TFLOP a sample at {rate:.0f} TFLOP/s)  "
        f"warm-up {row['warm_up_s']:.0f} s  {parts}",
        flush=True,
    )


def compare(ways: dict[str, dict]) -> None:
    speed = {way: row["samples_per_s"] for way, row in ways.items() if "samples_per_s" in row}
    for ours in "cd":
        for theirs in "ab":
            if ours in speed and theirs in speed:
                print(f"{ours} / {theirs} = {speed[ours] / speed[theirs]:.2f}", flush=True)


if __name__ == "__main__":
    main()
