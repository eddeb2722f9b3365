"""The reference policy (the opponent) over coming batches: one or more steps' at a time, in few large passes.

A frozen reference answers alike whenever it is asked. Asked for several steps at once it keeps the device busy without
recorded graphs, and its keys and values lie in memory that the policy's activations use afterwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from spvla.config import StepConfig
from spvla.model.transfer import AsyncHostCopy
from spvla.train.reference_store import ReferenceStore
from spvla.train.scoring import Inputs, ReferenceOutput, draw_uniforms, join, split, to_inputs
from spvla.train.timer import StepTimer
from spvla.types import Batch

ROWS = 120  # samples in one pass: on an H200 (7B) each 20 take 147 ms in passes of 80, 141 of 160; 20 alone take 162
MICRO_BATCHES = 8  # at most: a sample's keys and values (0.15 GiB, 7B) are a tenth of its activations in training


def together(batch_size: int) -> int:
    """Micro-batches in one pass."""
    return min(MICRO_BATCHES, max(1, ROWS // batch_size))


# A batch, and (B, A) numbers in [0, 1) that decide what is sampled.
Answer = Callable[[Inputs, Tensor], ReferenceOutput]


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """A micro-batch on the device, and the reference policy's answer to it."""

    inputs: Inputs
    reference: ReferenceOutput | None  # None where the objective has no reference policy
    samples: np.ndarray  # (B,) int64
    timer: StepTimer  # of scoring, together with `1 / share` others
    share: float


class ReferenceScorer:
    """Moves batches to the device and collects the reference policy's answers, known ones from the store."""

    def __init__(
        self, answer: Answer | None, device: torch.device, config: StepConfig, store: ReferenceStore | None
    ) -> None:
        """Without `answer` there is no reference policy."""
        self.answer, self.device, self.config, self.store = answer, device, config, store
        self.answered: list[tuple[np.ndarray, AsyncHostCopy]] = []  # samples, and answers to be kept
        self.width, self.filled = 0, 0  # text tokens and micro-batches to pad to: compiled code wants few shapes

    def score(self, coming: Sequence[Sequence[Batch]], step: int) -> list[list[ScoredBatch]]:
        """`coming` are the micro-batches of step number `step`, of the next, and so on; the answer's form is the same.

        What is sampled depends on the step in which it is used, not on when it was asked.
        """
        batches = [batch for micro in coming for batch in micro]
        steps = [step + i for i, micro in enumerate(coming) for _ in micro]
        timer = StepTimer(self.device)
        with timer("data"):
            inputs = self.inputs(batches)
        with timer("opponent"):
            outputs = self._outputs(batches, inputs, steps)
        scored = (
            ScoredBatch(inputs=x, reference=output, samples=batch.samples, timer=timer, share=1 / len(batches))
            for batch, x, output in zip(batches, inputs, outputs, strict=True)
        )
        return [list(islice(scored, len(micro))) for micro in coming]

    def inputs(self, batches: Sequence[Batch]) -> list[Inputs]:
        """On the device, text padded to the widest batch; under torch.compile to the widest so far."""
        width = max(batch.input_ids.shape[1] for batch in batches)
        if self.config.compile:
            width = self.width = max(self.width, width)
        return [to_inputs(batch, self.device, width=width) for batch in batches]

    def keep(self) -> None:
        """Puts what was answered so far into the store, for later epochs."""
        for samples, copied in self.answered:
            generated, real_logps, generated_logps = copied.read()
            output = ReferenceOutput(generated=generated, real_logps=real_logps, generated_logps=generated_logps)
            self.store.put(samples, output)
        self.answered.clear()

    def _outputs(
        self, batches: Sequence[Batch], inputs: Sequence[Inputs], steps: Sequence[int]
    ) -> list[ReferenceOutput | None]:
        if self.answer is None:
            return [None] * len(batches)
        outputs = [self.store.get(batch.samples, self.device) if self.store else None for batch in batches]
        unknown = [i for i, output in enumerate(outputs) if output is None]
        many = together(len(batches[0].samples))
        for chosen in (unknown[first : first + many] for first in range(0, len(unknown), many)):
            uniforms = [self._uniforms(batches[i], steps[i]) for i in chosen]
            for i, output in zip(chosen, self._pass([inputs[i] for i in chosen], uniforms), strict=True):
                outputs[i] = self.store.first(batches[i].samples, output) if self.store else output
                self._note(batches[i], output)
        return outputs

    def _pass(self, inputs: list[Inputs], uniforms: list[Tensor]) -> list[ReferenceOutput]:
        """One pass over the rows of all micro-batches; under torch.compile as many as ever, some repeated."""
        self.filled = max(self.filled, len(inputs)) if self.config.compile else len(inputs)
        whole = join(list(islice(cycle(inputs), self.filled)))
        output = self.answer(whole, torch.cat(list(islice(cycle(uniforms), self.filled))).to(self.device))
        return split(output, [len(x.text) for x in inputs])

    def _note(self, batch: Batch, output: ReferenceOutput) -> None:
        """For `keep`."""
        if self.store is not None:
            copied = AsyncHostCopy(output.generated, output.real_logps, output.generated_logps)
            self.answered.append((batch.samples, copied))

    def _uniforms(self, batch: Batch, step: int) -> Tensor:
        """(B, A). Answers that are kept are drawn once for all epochs."""
        tokens = batch.actions[0].size
        return torch.from_numpy(draw_uniforms(self.config.seed, 0 if self.store else step, batch.samples, tokens))


def reference_s(batches: Sequence[ScoredBatch]) -> dict[str, float]:
    """{"data_s": ..., "opponent_s": ...}: these batches' share of the seconds that the reference policy took."""
    parts = [{name: s * batch.share for name, s in batch.timer.seconds().items()} for batch in batches]
    return {name: sum(part[name] for part in parts) for name in parts[0]}
