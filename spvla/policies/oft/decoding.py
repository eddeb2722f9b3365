"""Chunks for a batch of observations in one pass, in a fixed bucket of rows and tokens.

Smaller batches are filled up by repeating the first request, prompts by padding that nothing sees. So the same kernels
run, on the same shapes, whoever shares a batch, and a request's chunk does not depend on it. On a GPU a pass is one
CUDA graph with static buffers, its steps compiled as plain OpenVLA's are.

Legend: B bucket, C cameras, T text tokens, S slots (chunk x 7), A action dims (7), K chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from spvla.errors import UserError
from spvla.model.attention import Attend, Rope
from spvla.model.kernels.compiled import gpu_kernels
from spvla.model.kernels.graphs import record
from spvla.model.llama import EAGER, Kernels, LlamaLayer, adding_in_place
from spvla.model.lora_bank import RowSlots
from spvla.model.quantized import is_quantised
from spvla.model.transfer import AsyncHostCopy, to_device
from spvla.policies.oft.chunks import prompt_text
from spvla.policies.oft.network import OftInputs, OpenVLAOFT
from spvla.policies.openvla.images import to_pixel_values
from spvla.types import IMAGE_SIZE, PROPRIO_DIM


@torch.inference_mode()
def answer(model: OpenVLAOFT, inputs: OftInputs, kernels: Kernels = EAGER) -> Tensor:
    """Discrete: ids (B, S) int64, the most likely of each slot. L1: normalised actions (B, K, A) float32."""
    hidden = model.predict(inputs, kernels)[:, :-1]
    if model.action_head is not None:
        return model.actions(hidden).float()
    return model.token_logits(hidden).argmax(-1) + model.first_token


@torch.inference_mode()
def probabilities(model: OpenVLAOFT, inputs: OftInputs, kernels: Kernels = EAGER) -> Tensor:
    """Of the tokens that compete in each slot: (B, S, V') float32. Discrete form only."""
    return model.token_logits(model.predict(inputs, kernels)[:, :-1]).float().softmax(-1)


def acting_kernels(steps: Kernels) -> Kernels:
    """A decoder's compiled steps, for whole sequences. Without gradients."""

    def attention(layer: LlamaLayer, x: Tensor, rope: Rope, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = steps.qkv(layer, x, rope)
        return attend(q, k, v), k, v

    return replace(adding_in_place(steps), attention=attention)


class ChunkDecoder:
    """`batch_size` rows, prompts of up to `max_prompt` tokens (BOS counted). cuda_graphs: None uses them on a GPU."""

    def __init__(
        self,
        model: OpenVLAOFT,
        *,
        batch_size: int,
        max_prompt: int,
        row_slots: RowSlots,
        cuda_graphs: bool | None = None,
        answer: Callable[[OpenVLAOFT, OftInputs, Kernels], Tensor] = answer,
    ) -> None:
        self.answer = answer
        self.model, self.batch_size, self.max_prompt, self.row_slots = model, batch_size, max_prompt, row_slots
        self.width = max_prompt + model.form.slots + 1  # text tokens
        self.images, self.inputs, self.slots = self._buffers()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.kernels = EAGER
        recordable = model.device.type == "cuda" and not is_quantised(model)
        if recordable if cuda_graphs is None else cuda_graphs:
            self.kernels = acting_kernels(gpu_kernels(model.dtype))
            self.graph, self.out = record(self._run)

    @torch.inference_mode()
    def start(
        self,
        images: np.ndarray,
        prompts: Sequence[Sequence[int]],
        *,
        proprio: np.ndarray | None = None,
        slots: Sequence[int],
    ) -> AsyncHostCopy:
        """Images (n, C, 224, 224, 3) uint8, normalised proprio (n, 8), resident adapters' slots -> n rows of `answer`.

        On a GPU it only enqueues, on the current stream; batches run in the order of their starts. Raises UserError.
        """
        n, longest = len(prompts), max(map(len, prompts))
        assert 0 < n <= self.batch_size and len(images) == len(slots) == n
        if longest > self.max_prompt:
            raise UserError(
                f"a prompt of {longest} tokens",
                expected=f"{self.max_prompt} at most",
                remedy="Make the decoder with a larger max_prompt.",
            )
        text, begin = prompt_text(prompts, self.model.form.slots, self.width)
        self._fill(self.images, images)
        self._fill(self.inputs.text, text)
        self._fill(self.inputs.start, begin)
        self._fill(self.slots, np.asarray(slots))
        if self.inputs.proprio is not None:
            self._fill(self.inputs.proprio, np.asarray(proprio, np.float32))
        if self.graph is None:
            return AsyncHostCopy(self._run()[:n])
        self.graph.replay()
        return AsyncHostCopy(self.out[:n])

    def _fill(self, buffer: Tensor, values: np.ndarray) -> None:
        """Moves the n rows to the device, and repeats the first there."""
        there = to_device(torch.from_numpy(np.ascontiguousarray(values)), buffer.device)
        buffer[: len(values)].copy_(there)
        buffer[len(values) :].copy_(there[:1].expand_as(buffer[len(values) :]))

    @torch.inference_mode()
    def _run(self) -> Tensor:
        self.row_slots.slots = self.slots
        pixels = to_pixel_values(self.images.flatten(0, 1)).unflatten(0, self.images.shape[:2])
        return self.answer(self.model, self.inputs._replace(pixels=pixels), self.kernels)

    def _buffers(self) -> tuple[Tensor, OftInputs, Tensor]:
        b, form, device = self.batch_size, self.model.form, self.model.device
        size = (b, form.cameras, IMAGE_SIZE, IMAGE_SIZE, 3)
        inputs = OftInputs(
            pixels=torch.empty(0, device=device),
            proprio=torch.zeros(b, PROPRIO_DIM, device=device) if form.proprio else None,
            text=torch.zeros(b, self.width, dtype=torch.int64, device=device),
            start=torch.full((b,), self.max_prompt, device=device),
        )
        return torch.zeros(size, dtype=torch.uint8, device=device), inputs, torch.zeros(b, dtype=torch.int64).to(device)
