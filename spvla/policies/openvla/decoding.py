"""Seven action tokens for a batch of images and prompts: one prefill, six cached steps.

Prompts of different lengths share a batch. The prefill takes them packed, one after another, so that no product is
spent on padding; attention keeps them apart, and a row's generated tokens follow its prompt in the cache. So every row
has the positions it would have alone, and its tokens equal those of a batch of one.

On a GPU the whole of it, from pixels to seven tokens, is one CUDA graph with static buffers, its steps compiled once
for all layers. A decoder has a fixed batch size, its bucket: smaller batches are filled up, larger ones split. The same
kernels then run whoever shares the batch, and so a request's result does not depend on it. What does vary is the number
of packed tokens: there is a graph for each step of it, taken into use only if it gives the very bits of the largest.

Legend: B bucket, T prompt tokens, N packed tokens, S cache slots a row, A action tokens (7), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spvla.errors import UserError
from spvla.model.attention import Packing
from spvla.model.kernels.compiled import gpu_kernels
from spvla.model.kernels.graphs import record
from spvla.model.llama import EAGER, Cache, Kernels, adding_in_place
from spvla.model.lora_bank import RowSlots
from spvla.model.openvla import OpenVLA, with_patches
from spvla.model.quantized import is_quantised
from spvla.model.sampling import choose
from spvla.model.transfer import AsyncHostCopy, to_device
from spvla.model.vision import NUM_PATCHES
from spvla.policies.openvla.prompt import PAD
from spvla.types import ACTION_DIM, IMAGE_SIZE

Graph = tuple[torch.cuda.CUDAGraph, "Decoded"]


@dataclass(frozen=True, kw_only=True)
class DecoderInputs:
    """What one pass reads: static buffers under a CUDA graph."""

    pixel_values: Tensor  # (B, 6, 224, 224)
    prompts: Tensor  # (B, T) int64, right-padded
    lengths: Tensor  # (B,) int64, tokens of each prompt
    starts: Tensor  # (B + 1,) int32: where each packed prompt begins, patches counted
    places: Tensor  # (B (256 + T),) int64, of which a pass takes the first N: see Packing
    temperatures: Tensor  # (B,) float32, 0: greedy
    uniforms: Tensor  # (B, A) float64 in [0, 1): what sampling draws, one number a token
    slots: Tensor  # (B,) int64: each row's resident adapter, 0 the base

    def take(self, pixel_values: Tensor, other: dict[str, Tensor]) -> None:
        """Enqueues copies; rows beyond those of `pixel_values` repeat the first."""
        n = len(pixel_values)
        self.pixel_values[:n].copy_(pixel_values, non_blocking=True)
        self.pixel_values[n:].copy_(pixel_values[:1])
        for name, value in other.items():
            getattr(self, name).copy_(to_device(value, self.lengths.device))

    def take_places(self, places: Tensor, starts: Tensor) -> None:
        self.places[: len(places)].copy_(to_device(places, self.places.device))
        self.starts.copy_(to_device(starts, self.starts.device))


@dataclass(frozen=True, kw_only=True)
class Decoded:
    ids: Tensor  # (B, A) int64
    logits: Tensor | None  # (B, A, V) float32, before temperature


class PendingBatch:
    """A batch under way. The host may start the next one before it asks for this one's result."""

    def __init__(self, ids: Tensor, logits: Tensor | None) -> None:
        self.copy = AsyncHostCopy(*(t for t in (ids, logits) if t is not None))

    def result(self) -> Decoded:
        """On the host. Waits for this batch alone, not for what was started after it."""
        ids, *logits = self.copy.read()
        return Decoded(ids=ids, logits=logits[0] if logits else None)


@torch.inference_mode()
def generate(
    model: OpenVLA,
    inputs: DecoderInputs,
    cache: Cache,
    kernels: Kernels = EAGER,
    *,
    tokens: int,
    row_slots: RowSlots,
    sampled: bool = True,
) -> Decoded:
    """The whole decoding as a function of tensors, `tokens` of them in the prompts. Unless `sampled`, all are greedy.

    `row_slots` learns which resident adapter each row or token of the coming products uses.
    """
    llama, places = model.language_model.model, inputs.places[:tokens]
    packing = Packing(starts=inputs.starts, places=places)
    row, at = places // cache.slots, places % cache.slots
    row_slots.slots, row_slots.owners = inputs.slots, row
    x = with_patches(model.embed(inputs.prompts), model.patches(inputs.pixel_values, kernels))  # (B, P + T, D)
    last = inputs.lengths + NUM_PATCHES - 1  # (B,) in the cache
    packed = x.flatten(0, 1).index_select(0, row * x.shape[1] + at)[None]  # (1, N, D)
    hidden = llama.read(packed, packing, last, cache, kernels)  # (B, 1, D)
    ids: list[Tensor] = []
    every: list[Tensor] = []
    for step in range(ACTION_DIM):
        if step:
            hidden = llama.step(model.embed(ids[-1][:, None]), last + step, cache.layers, kernels)
        logits = model.logits(hidden)[:, 0].float()
        drawn = choose(logits, inputs.temperatures, inputs.uniforms[:, step]) if sampled else logits.argmax(-1)
        ids.append(drawn)
        every.append(logits)
    return Decoded(ids=torch.stack(ids, 1), logits=torch.stack(every, 1))


def draw_uniforms(seed: int) -> Tensor:
    """(A,) float64: a request's own randomness, whatever batch it is in."""
    return torch.rand(ACTION_DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Decoder:
    """Decodes in a fixed bucket: `batch_size` rows, prompts of up to `max_prompt` tokens (BOS counted).

    row_slots: through which the model's maps learn each row's resident adapter. cuda_graphs: None uses them on a GPU.
    """

    def __init__(
        self,
        model: OpenVLA,
        *,
        batch_size: int,
        max_prompt: int,
        row_slots: RowSlots | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        self.model, self.batch_size, self.max_prompt = model, batch_size, max_prompt
        self.row_slots = row_slots or RowSlots()
        self.most = batch_size * (NUM_PATCHES + max_prompt)  # tokens of the prompts, at most
        slots = NUM_PATCHES + max_prompt + ACTION_DIM - 1
        self.cache = Cache(model.config.llm, batch_size, slots, dtype=model.dtype, device=model.device)
        self.inputs = self._buffers()
        self.graphs: dict[tuple[int, bool], Graph] = {}  # by packed tokens, and whether any request is sampled
        self.trusted: dict[tuple[int, bool], int] = {}  # packed tokens, with adapters or without -> those of the graph
        self.kernels = adding_in_place(EAGER)
        self.quantised = is_quantised(model)  # then nothing can be compiled or recorded
        if model.device.type == "cuda" and not self.quantised if cuda_graphs is None else cuda_graphs:
            self._capture()

    def decode(self, pixel_values: Tensor, prompts: Sequence[Sequence[int]], **options: Any) -> Decoded:
        """`start`, and its result."""
        return self.start(pixel_values, prompts, **options).result()

    @torch.inference_mode()
    def start(
        self,
        pixel_values: Tensor,
        prompts: Sequence[Sequence[int]],
        *,
        logits: bool = False,
        temperature: Sequence[float] | float = 0.0,
        seeds: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
    ) -> PendingBatch:
        """(n, 6, 224, 224) and n <= batch_size prompts -> n rows. Seeds, one a request, are needed to sample.

        On a GPU it only enqueues, on the current stream, but for the first batch of so many tokens: see `_trust`.
        Batches run in the order of their starts, which must come from one thread at a time. slots: of the resident
        adapter of each request; by default all use the base. Raises UserError.
        """
        n = len(prompts)
        heat = [float(temperature)] * n if isinstance(temperature, int | float) else list(temperature)
        self._check(pixel_values, prompts, heat, seeds)
        self.inputs.take(pixel_values, self._padded(prompts, heat, seeds or [0] * n, slots or [0] * n))
        lengths = [len(p) for p in prompts] + [len(prompts[0])] * (self.batch_size - n)
        if self.graphs:
            out = self._play(lengths, self._trust(lengths, max(slots or [0])), any(heat))
        else:
            out = self._run(lengths, any(heat))
        return PendingBatch(out.ids[:n], out.logits[:n] if logits else None)

    def _run(self, lengths: Sequence[int], sampled: bool) -> Decoded:
        """With quantised maps at the bucket's full size: they run on a GPU, where a product's bits follow its shape."""
        tokens = self.most if self.quantised else sum(lengths) + NUM_PATCHES * self.batch_size
        return self._generate(self._place(lengths, tokens), sampled)

    def _generate(self, tokens: int, sampled: bool) -> Decoded:
        kind = {"tokens": tokens, "row_slots": self.row_slots, "sampled": sampled}
        return generate(self.model, self.inputs, self.cache, self.kernels, **kind)

    def _play(self, lengths: Sequence[int], tokens: int, sampled: bool) -> Decoded:
        """By the graph of so many packed tokens. It is recorded when first asked for, in the memory of the others."""
        key = (self._place(lengths, tokens), sampled)
        if key not in self.graphs:
            pool = self.graphs[self.most, False][0].pool()
            self.graphs[key] = record(lambda: self._generate(*key), pool=pool)
        graph, out = self.graphs[key]
        graph.replay()
        return out

    def _trust(self, lengths: Sequence[int], adapter: int) -> int:
        """How many packed tokens the batch's graph has: its own number, rounded up to a multiple of the bucket, or the
        largest.

        cuBLAS may choose another kernel for another number of rows. So the first batch of each number is decoded by
        both graphs, by the base and by an `adapter`, if one is asked for; the smaller graph is used only if all bits
        agree.
        """
        tokens = (NUM_PATCHES + -(-sum(lengths) // self.batch_size)) * self.batch_size
        key = tokens, adapter > 0
        if tokens < self.most and key not in self.trusted:
            same = all(self._agree(lengths, tokens, slot) for slot in {0, adapter})
            self.trusted[key] = tokens if same else self.most
        return self.trusted.get(key, self.most)

    def _agree(self, lengths: Sequence[int], tokens: int, slot: int) -> bool:
        """Whether the graphs of so many packed tokens and of most give the same bits, every row by one slot."""
        asked = self.inputs.slots.clone()
        self.inputs.slots.fill_(slot)
        packed = self._play(lengths, tokens, False).logits.clone()
        same = torch.equal(packed, self._play(lengths, self.most, False).logits)
        self.inputs.slots.copy_(asked)
        return same

    def _place(self, lengths: Sequence[int], tokens: int) -> int:
        """Packs prompts of these lengths into `tokens`, which it returns; what is left over pads the first rows."""
        left = tokens - sum(lengths) - NUM_PATCHES * self.batch_size
        sizes = []
        for length in lengths:
            padding = min(left, self.max_prompt - length)
            sizes.append(NUM_PATCHES + length + padding)
            left -= padding
        rows = [np.arange(size) + row * self.cache.slots for row, size in enumerate(sizes)]
        starts = np.cumsum([0, *sizes], dtype=np.int32)
        self.inputs.take_places(torch.from_numpy(np.concatenate(rows)), torch.from_numpy(starts))
        return tokens

    def _check(
        self, pixel_values: Tensor, prompts: Sequence[Sequence[int]], heat: Sequence[float], seeds: Sequence[int] | None
    ) -> None:
        assert 0 < len(prompts) <= self.batch_size and len(pixel_values) == len(heat) == len(prompts)
        longest = max(map(len, prompts))
        if longest > self.max_prompt:
            raise UserError(
                f"a prompt of {longest} tokens",
                expected=f"{self.max_prompt} at most",
                remedy="Make the decoder with a larger max_prompt.",
            )
        if seeds is None and any(heat):
            raise UserError(f"temperature {max(heat)} without seeds", expected="one a request", remedy="Add seeds.")

    def _padded(
        self, prompts: Sequence[Sequence[int]], heat: Sequence[float], seeds: Sequence[int], slots: Sequence[int]
    ) -> dict[str, Tensor]:
        """Fills the bucket up by repeating the first request."""
        n = len(prompts)
        rows = [*range(n), *[0] * (self.batch_size - n)]
        padded = [[*p, *[PAD] * (self.max_prompt - len(p))] for p in prompts]
        greedy = torch.zeros(ACTION_DIM, dtype=torch.float64)
        uniforms = [draw_uniforms(seed) if t > 0 else greedy for seed, t in zip(seeds, heat, strict=True)]
        return {
            "prompts": torch.tensor(padded)[rows],
            "lengths": torch.tensor([len(p) for p in prompts])[rows],
            "temperatures": torch.tensor(heat)[rows],
            "uniforms": torch.stack(uniforms)[rows],
            "slots": torch.tensor(slots)[rows],
        }

    def _buffers(self) -> DecoderInputs:
        b, device = self.batch_size, self.model.device
        return DecoderInputs(
            pixel_values=torch.zeros(b, 6, IMAGE_SIZE, IMAGE_SIZE, dtype=self.model.dtype, device=device),
            prompts=torch.full((b, self.max_prompt), PAD, device=device),
            lengths=torch.full((b,), self.max_prompt, device=device),
            starts=torch.zeros(b + 1, dtype=torch.int32, device=device),
            places=torch.zeros(self.most, dtype=torch.int64, device=device),
            temperatures=torch.zeros(b, device=device),
            uniforms=torch.zeros(b, ACTION_DIM, dtype=torch.float64, device=device),
            slots=torch.zeros(b, dtype=torch.int64, device=device),
        )

    def _capture(self) -> None:
        """Compiles the steps of a layer, then records the largest pass."""
        self.kernels = adding_in_place(gpu_kernels(self.model.dtype))
        key = (self._place([self.max_prompt] * self.batch_size, self.most), False)
        self.graphs[key] = record(lambda: self._generate(*key))
