"""Questions to the opponent: the micro-batches of one or more coming steps, answered in few large passes.

A frozen opponent answers alike whenever it is asked. Asked for several steps at once it keeps the device busy without
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
from spvla.train.clock import Clock
from spvla.train.replies import ReplyStore
from spvla.train.scoring import Inputs, ReferenceOutput, draw_uniforms, join, split, to_inputs
from spvla.types import Batch

ROWS = 120  # samples in one pass: on an H200 (7B) each 20 take 147 ms in passes of 80, 141 of 160; 20 alone take 162
MICRO_BATCHES = 8  # at most: a sample's keys and values (0.15 GiB, 7B) are a tenth of its activations in training


def together(batch_size: int) -> int:
    """Micro-batches in one pass."""
    return min(MICRO_BATCHES, max(1, ROWS // batch_size))


# A batch, and (B, A) numbers in [0, 1) that decide what is sampled.
Answer = Callable[[Inputs, Tensor], ReferenceOutput]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A micro-batch on the device, and what the opponent says to it."""

    inputs: Inputs
    reply: ReferenceOutput | None  # None where no opponent plays (sft)
    samples: np.ndarray  # (B,) int64
    clock: Clock  # of asking, together with `1 / share` others
    share: float


class Asker:
    """Moves batches to the device and collects the opponent's replies, known ones from the store."""

    def __init__(
        self, answer: Answer | None, device: torch.device, config: StepConfig, replies: ReplyStore | None
    ) -> None:
        """Without `answer` no opponent plays."""
        self.answer, self.device, self.config, self.replies = answer, device, config, replies
        self.answered: list[tuple[np.ndarray, AsyncHostCopy]] = []  # samples, and replies to be kept
        self.width, self.filled = 0, 0  # text tokens and micro-batches to pad to: compiled code wants few shapes

    def ask(self, coming: Sequence[Sequence[Batch]], step: int) -> list[list[Question]]:
        """`coming` are the micro-batches of step number `step`, of the next, and so on; the answer's form is the same.

        What is sampled depends on the step in which it is used, not on when it was asked.
        """
        batches = [batch for micro in coming for batch in micro]
        steps = [step + i for i, micro in enumerate(coming) for _ in micro]
        clock = Clock(self.device)
        with clock("data"):
            inputs = self.inputs(batches)
        with clock("opponent"):
            replies = self._replies(batches, inputs, steps)
        questions = (
            Question(inputs=x, reply=reply, samples=batch.samples, clock=clock, share=1 / len(batches))
            for batch, x, reply in zip(batches, inputs, replies, strict=True)
        )
        return [list(islice(questions, len(micro))) for micro in coming]

    def inputs(self, batches: Sequence[Batch]) -> list[Inputs]:
        """On the device, text padded to the widest batch; under torch.compile to the widest so far."""
        width = max(batch.input_ids.shape[1] for batch in batches)
        if self.config.compile:
            width = self.width = max(self.width, width)
        return [to_inputs(batch, self.device, width=width) for batch in batches]

    def keep(self) -> None:
        """Puts what was answered so far into the store, for later epochs."""
        for samples, landing in self.answered:
            generated, real_logps, generated_logps = landing.read()
            reply = ReferenceOutput(generated=generated, real_logps=real_logps, generated_logps=generated_logps)
            self.replies.put(samples, reply)
        self.answered.clear()

    def _replies(
        self, batches: Sequence[Batch], inputs: Sequence[Inputs], steps: Sequence[int]
    ) -> list[ReferenceOutput | None]:
        if self.answer is None:
            return [None] * len(batches)
        replies = [self.replies.get(batch.samples, self.device) if self.replies else None for batch in batches]
        unknown = [i for i, reply in enumerate(replies) if reply is None]
        many = together(len(batches[0].samples))
        for chosen in (unknown[first : first + many] for first in range(0, len(unknown), many)):
            uniforms = [self._uniforms(batches[i], steps[i]) for i in chosen]
            for i, reply in zip(chosen, self._pass([inputs[i] for i in chosen], uniforms), strict=True):
                replies[i] = self.replies.first(batches[i].samples, reply) if self.replies else reply
                self._note(batches[i], reply)
        return replies

    def _pass(self, inputs: list[Inputs], uniforms: list[Tensor]) -> list[ReferenceOutput]:
        """One pass over the rows of all micro-batches; under torch.compile as many as ever, some repeated."""
        self.filled = max(self.filled, len(inputs)) if self.config.compile else len(inputs)
        whole = join(list(islice(cycle(inputs), self.filled)))
        reply = self.answer(whole, torch.cat(list(islice(cycle(uniforms), self.filled))).to(self.device))
        return split(reply, [len(x.text) for x in inputs])

    def _note(self, batch: Batch, reply: ReferenceOutput) -> None:
        """For `keep`."""
        if self.replies is not None:
            landing = AsyncHostCopy(reply.generated, reply.real_logps, reply.generated_logps)
            self.answered.append((batch.samples, landing))

    def _uniforms(self, batch: Batch, step: int) -> Tensor:
        """(B, A). Replies that are kept are drawn once for all epochs."""
        tokens = batch.actions[0].size
        return torch.from_numpy(draw_uniforms(self.config.seed, 0 if self.replies else step, batch.samples, tokens))


def asking_s(questions: Sequence[Question]) -> dict[str, float]:
    """{"data_s": ..., "opponent_s": ...}: these questions' share of the seconds that asking took."""
    parts = [{name: s * q.share for name, s in q.clock.seconds().items()} for q in questions]
    return {name: sum(part[name] for part in parts) for name in parts[0]}
