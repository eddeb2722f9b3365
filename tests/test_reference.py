"""The reference policy over several steps at once answers as it does one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from selfplay_parts import ragged_batch, take_step, tiny_learner, tiny_lora

from spvla.config import StepConfig
from spvla.train.reference import together
from spvla.train.reference_store import ReferenceStore
from spvla.train.scoring import Inputs, ReferenceOutput
from spvla.types import ACTION_DIM

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("objective", ["spin", "spvla", "sft"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_asked_together_are_answered_as_if_asked_one_by_one(objective: str, temperature: float) -> None:
    """Three steps of two micro-batches of unlike widths; what is sampled depends on the step alone."""
    config = StepConfig(objective=objective, opponent_temperature=temperature)
    learner = tiny_learner(config, opponent=tiny_lora(1))
    coming = [[ragged_batch(2, seed=2 * i), ragged_batch(2, seed=2 * i + 1)] for i in range(3)]
    together = learner.prepare(coming)
    assert len({q.inputs.text.shape for step in together for q in step}) == 1
    for batches_ahead, batches in zip(together, coming, strict=True):
        (batches_now,) = learner.prepare([batches])
        for ahead, now in zip(batches_ahead, batches_now, strict=True):
            assert np.array_equal(ahead.samples, now.samples) and torch.equal(ahead.inputs.real, now.inputs.real)
            assert (ahead.reference is None) == (now.reference is None) == (objective == "sft")
            if ahead.reference is not None:
                assert torch.equal(ahead.reference.generated, now.reference.generated)
                for name in ("real_logps", "generated_logps"):
                    ours, theirs = getattr(ahead.reference, name), getattr(now.reference, name)
                    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        learner.step(batches_ahead).read()


def test_of_several_batches_only_the_unknown_are_passed_on(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "answers.bin", num_samples=1000, key="")
    learner = tiny_learner(StepConfig(), answers=store)
    old, new = ragged_batch(2, seed=1), ragged_batch(3, seed=2)
    take_step(learner, old)
    before, reply = learner.prepare([[old]])[0][0].reference, learner.reference.answer

    def only_three(inputs: Inputs, uniforms: torch.Tensor) -> ReferenceOutput:
        assert len(inputs.text) == 3
        return reply(inputs, uniforms)

    learner.reference.answer = only_three
    (known,), (asked,) = learner.prepare([[old], [new]])
    assert torch.equal(known.reference.generated, before.generated) and len(asked.reference.generated) == 3


def test_what_was_answered_first_stays(tmp_path: Path) -> None:
    """A batch of known and new samples is answered as a whole, which may round otherwise than before."""
    store = ReferenceStore(tmp_path / "answers.bin", num_samples=10, key="")

    def reply(value: float, size: int) -> ReferenceOutput:
        real, generated = torch.full((size, ACTION_DIM), value), torch.full((size, ACTION_DIM), -value)
        return ReferenceOutput(generated=torch.full((size, ACTION_DIM), 7), real_logps=real, generated_logps=generated)

    store.put(np.array([3]), reply(1.0, 1))
    both = store.first(np.array([3, 4]), reply(2.0, 2))
    assert both.real_logps[:, 0].tolist() == [1.0, 2.0] and both.generated_logps[:, 0].tolist() == [-1.0, -2.0]
    store.put(np.array([3, 4]), reply(2.0, 2))
    assert torch.equal(store.get(np.array([3, 4]), "cpu").real_logps, both.real_logps)


def test_a_moving_opponent_is_not_asked_ahead() -> None:
    learner = tiny_learner(StepConfig(opponent_update="ema"))
    with pytest.raises(AssertionError, match="moved"):
        learner.prepare([[ragged_batch(2)], [ragged_batch(2)]])


def test_compiled_code_sees_passes_of_one_size_and_answers_stay_the_same() -> None:
    """Where fewer steps are left than were asked before, some rows are repeated."""
    coming = [[ragged_batch(2, seed=seed)] for seed in range(3)]
    plain, filled = tiny_learner(StepConfig()).reference, tiny_learner(StepConfig()).reference
    filled.config = StepConfig(compile=True)  # what is padded, without the compiler
    sizes, reply = [], filled.answer

    def watched(inputs: Inputs, uniforms: torch.Tensor) -> ReferenceOutput:
        sizes.append(tuple(inputs.text.shape))
        return reply(inputs, uniforms)

    filled.answer = watched
    filled.score(coming, 0)
    ((ours,),), ((theirs,),) = filled.score(coming[:1], 3), plain.score(coming[:1], 3)
    assert torch.equal(ours.reference.generated, theirs.reference.generated)
    assert len(sizes) == 2 and sizes[0] == sizes[1]


def test_a_pass_has_120_samples_but_no_more_than_eight_micro_batches() -> None:
    assert [together(size) for size in (200, 80, 40, 20, 4, 1)] == [1, 1, 3, 6, 8, 8]
