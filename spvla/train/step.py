"""One update in plain torch: the reference policy's answers, losses, gradient, clip, AdamW. No Ray, no files.

    learner = Learner(model, config, policy=adapter)    # `opponent`: another adapter, unless the bare base plays
    now, later = learner.prepare([first, second])       # the micro-batches of two steps: the opponent answers them all
    pending = learner.step(now)                         # one optimiser step, which the device may still be at
    metrics = pending.read()                            # waits for its numbers

The opponent has answered before the policy learns. So the number of pairs that count is known before the first
backward pass, and the gradient is that of one mean over all micro-batches and workers.
Workers (torch.distributed, if initialised) meet twice a step: once to add that number, once to add the gradient, which
covers the adapter only. What is not finite is skipped on the device; the host learns of it when it reads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spvla.config import StepConfig
from spvla.errors import CheckpointError, TrainingError, UserError
from spvla.model.kernels.compiled import training_kernels
from spvla.model.llama import EAGER
from spvla.model.lora_file import LoraFile
from spvla.model.openvla import OpenVLA
from spvla.model.transfer import AsyncHostCopy
from spvla.policies.openvla.presets import ACTION_IDS
from spvla.train.family import family_of
from spvla.train.flat import Bare, FlatLora, FlatWeights
from spvla.train.graphed import GraphedVisionEncoder
from spvla.train.measures import Columns, extremes
from spvla.train.network import Network, require_zeros_beside
from spvla.train.objectives import objective_of
from spvla.train.optimizer import Optimizer
from spvla.train.reference import Answer, ReferenceScorer, ScoredBatch, reference_s
from spvla.train.reference_store import ReferenceStore
from spvla.train.scoring import Inputs, ReferenceOutput
from spvla.train.settings import learning_rate
from spvla.train.timer import StepTimer, memory_gib
from spvla.types import Batch


class Shares(NamedTuple):
    """What one sample, and one pair that counts, weigh in the mean over micro-batches and workers."""

    sample: float
    pair: float | Tensor


class Measured(NamedTuple):
    sums: dict[str, Tensor]  # scalars; added over micro-batches and workers they are the step's metrics
    extremes: Tensor  # (2,) largest action logit, and smallest negated


@dataclass(frozen=True)
class Pending:
    """A step that the device may still be at. Each is read once, in the order of the steps."""

    step: int  # from 1 on
    read: Callable[[], dict[str, float]]  # waits for its metrics; raises TrainingError as max_nonfinite_steps says


class Learner:
    """Policy, opponent, optimiser and their state. `step` trains, `evaluate` does not."""

    def __init__(
        self,
        model: OpenVLA,
        config: StepConfig,
        *,
        policy: LoraFile | None = None,
        opponent: LoraFile | None = None,
        answers: ReferenceStore | None = None,
    ) -> None:
        """policy: the adapter to train, where use_lora; else every weight is. opponent: without one the bare base
        plays. `answers` keeps the opponent's over epochs: only where images are not augmented. Raises UserError.
        """
        assert (policy is not None) == config.use_lora, "an adapter is trained, or every weight"
        if answers is not None and config.opponent_update == "ema":
            raise UserError(
                "answers kept over epochs of an opponent that moves",
                expected="a frozen opponent",
                remedy="Use --opponent_update iteration, or keep no answers.",
            )
        self.config, self.objective = config, objective_of(config)
        fits = not (self.objective.has_reference and "action_head" in model.added())
        assert fits, "checked by prepare.require_tokens"
        columns = ACTION_IDS if config.loss_columns == "action" else slice(None)
        kernels = training_kernels() if config.compile else EAGER
        self.network = Network(model=model, kernels=kernels, columns=columns)
        require_zeros_beside(self.network)
        self.family, self.device = family_of(self.network), model.device
        self.policy = FlatWeights(model) if policy is None else FlatLora(model, policy, trainable=True)
        recorded = self.device.type == "cuda" and config.use_lora and not config.lora_dropout
        self.encoder = GraphedVisionEncoder(self.network, self.policy, recorded=recorded)
        self.average, playing = self._playing(policy, opponent)
        self.reference = ReferenceScorer(self._answers(playing), self.device, config, answers)
        self.world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._share_start()
        self.optimizer = Optimizer(self.policy, self.average, config)
        self.columns = Columns.of(self.network.vocabulary, columns, self.device)
        self.steps = 0  # taken, skipped ones included
        self.nonfinite = 0  # in a row, as far as read

    def prepare(self, coming: Sequence[Sequence[Batch]]) -> list[list[ScoredBatch]]:
        """The micro-batches of the coming steps, moved and answered. A moving opponent answers one step."""
        assert self.average is None or len(coming) == 1, "the opponent will have moved"
        return self.reference.score(coming, self.steps)

    def step(self, batches: Sequence[ScoredBatch]) -> Pending:
        """One optimiser step over all micro-batches and workers. Does not wait for a GPU."""
        timer = StepTimer(self.device)
        self.optimizer.gradient.zero_()
        self._seed_dropout()
        shares = self._shares(batches)
        measured = []
        for batch in batches:
            with timer("forward"):
                loss, measures = self._loss(batch.inputs, batch.reference, shares)
            with timer("backward"):
                self.policy.add_gradient(loss, self.optimizer.gradient)
            measured.append(measures)
        values, rate = self._gather(measured), learning_rate(self.config, self.steps)
        values |= self.optimizer.update(values["total_loss"], values.get("hard_rate"), rate)
        self.steps += 1
        copied = AsyncHostCopy(torch.stack([value.float() for value in values.values()]))

        def read() -> dict[str, float]:
            metrics = dict(zip(values, copied.read()[0].tolist(), strict=True)) | {"learning_rate": rate}
            self.reference.keep()
            self._count_nonfinite(metrics)
            return metrics | reference_s(batches) | timer.seconds() | {"memory_gib": memory_gib(self.device)}

        return Pending(self.steps, read)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, float]:
        """Teacher-forced `train_loss`, `action_accuracy` and `l1_loss` of one batch on this worker, without a step."""
        (inputs,) = self.reference.inputs([batch])
        with self.policy.attached():
            measures = self.objective.validate(self.family, inputs, self.columns)
        values = torch.stack([value.mean() for value in measures.values()]).tolist()
        return dict(zip(measures, values, strict=True))

    def state_dict(self) -> dict[str, object]:
        """Everything that a later step depends on, exactly: tensors and numbers. After all steps were read."""
        return {
            "steps": self.steps,
            "nonfinite": self.nonfinite,
            "policy": self.policy.master.clone(),
            "opponent": None if self.average is None else self.average.master.clone(),
            "moments": self.optimizer.moments(),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Inverse of `state_dict`. Raises CheckpointError where the state is another model's."""
        if state["policy"].shape != self.policy.master.shape:
            raise CheckpointError(
                f"a training state of {len(state['policy'])} trained numbers",
                expected=f"{len(self.policy.master)}, as this model with this --lora_rank has",
                remedy="Go on with the flags that the run was started with.",
            )
        self.steps, self.nonfinite = int(state["steps"]), int(state["nonfinite"])
        self.policy.load(state["policy"])
        if self.average is not None:
            self.average.load(state["opponent"])
        self.optimizer.load(state["moments"])

    def _playing(
        self, policy: LoraFile | None, opponent: LoraFile | None
    ) -> tuple[FlatLora | None, FlatLora | Bare | None]:
        """The moving average, if the opponent is one; and who plays, None where nobody does."""
        ema = self.config.opponent_update == "ema"
        start = opponent or (policy if ema else None)  # an average that has no adapter of its own starts as the policy
        if not self.objective.has_reference:
            return None, None
        if start is None:
            return None, Bare(self.network.model)
        playing = FlatLora(self.network.model, start, trainable=False)
        return (playing if ema else None), playing

    def _answers(self, playing: FlatLora | Bare | None) -> Answer | None:
        if playing is None:
            return None

        def answer(inputs: Inputs, uniforms: Tensor) -> ReferenceOutput:
            with playing.attached():
                return self.objective.answer(self.family, inputs, uniforms)

        return answer

    def _share_start(self) -> None:
        """All workers start from rank 0's weights."""
        if self.world > 1:
            dist.broadcast(self.policy.master, 0)
            self.policy.refresh()

    def _seed_dropout(self) -> None:
        """Stateless: step N draws the same masks whether or not the run was resumed before it."""
        if self.config.lora_dropout:
            rank = dist.get_rank() if self.world > 1 else 0
            torch.manual_seed(int(np.random.SeedSequence((self.config.seed, self.steps, rank)).generate_state(1)[0]))

    def _shares(self, batches: Sequence[ScoredBatch]) -> Shares:
        sample = 1 / (sum(len(batch.samples) for batch in batches) * self.world)
        counts = [self.objective.counts(batch.inputs, batch.reference) for batch in batches]
        if any(count is None for count in counts):
            return Shares(sample=sample, pair=sample)
        kept = sum(count.sum() for count in counts).float()
        if self.world > 1:
            dist.all_reduce(kept)
        return Shares(sample=sample, pair=1 / kept.clamp(min=1))

    def _loss(self, inputs: Inputs, reference: ReferenceOutput | None, shares: Shares) -> tuple[Tensor, Measured]:
        """A micro-batch's part of the loss, and of the metrics. Parts add up over the step."""
        with self.policy.attached(dropout=self.config.lora_dropout):
            patches = self.encoder(inputs.pixels)
            losses = self.objective.losses(self.family, inputs, reference, self.columns, patches)
        sums = {name: (value.detach() * shares.sample).sum() for name, value in losses.measures.items()}
        loss = (losses.sample * shares.sample).sum()
        if losses.pair is not None:
            counts = self.objective.counts(inputs, reference)
            pair = (losses.pair * (shares.pair if counts is None else shares.pair * counts)).sum()
            loss, sums["selfplay_loss"] = loss + pair, pair.detach()
        if losses.is_hard is not None:
            loss = loss.masked_fill(losses.is_hard, 0.0)
            sums["hard_rate"] = losses.is_hard * (shares.sample * len(inputs.text))
        sums["total_loss"] = loss.detach()
        return loss, Measured(sums=sums, extremes=extremes(losses.outputs))

    def _gather(self, measured: Sequence[Measured]) -> dict[str, Tensor]:
        """Adds up micro-batches and workers, gradient included."""
        names = list(measured[0].sums)
        sums = torch.stack([torch.stack([m.sums[name].float() for name in names]) for m in measured]).sum(0)
        peaks = torch.stack([m.extremes for m in measured]).amax(0)
        if self.world > 1:
            dist.all_reduce(self.optimizer.gradient)
            dist.all_reduce(sums)
            dist.all_reduce(peaks, dist.ReduceOp.MAX)
        high, low = peaks
        return dict(zip(names, sums, strict=True)) | {"action_logit_max": high, "action_logit_min": -low}

    def _count_nonfinite(self, metrics: dict[str, float]) -> None:
        """Adds the count to the metrics. Raises TrainingError where it is hopeless."""
        finite = math.isfinite(metrics["total_loss"]) and math.isfinite(metrics["grad_norm"])
        self.nonfinite = 0 if finite else self.nonfinite + 1
        metrics["nonfinite_in_a_row"] = float(self.nonfinite)
        if self.nonfinite < self.config.max_nonfinite_steps:
            return
        steps = f"{self.nonfinite} step{'s' * (self.nonfinite > 1)} in a row"
        raise TrainingError(
            f"{steps} with a loss or gradient that is not finite (the last: loss "
            f"{metrics['total_loss']}, gradient norm {metrics['grad_norm']}). The last checkpoint stays. "
            "Lower --learning_rate, or set --max_grad_norm, --warmup_steps or --logit_softcap."
        )
