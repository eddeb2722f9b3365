"""Objectives are objects: a new one is a class and its registration, and nobody else asks for a name."""

import re
from pathlib import Path
from typing import get_args

import pytest
from selfplay_parts import ragged_batch, take_step, tiny_learner
from torch import Tensor

from spvla import config
from spvla.config import StepConfig
from spvla.errors import UserError
from spvla.train.family import Family
from spvla.train.measures import Columns
from spvla.train.objectives import OBJECTIVES, objective_of
from spvla.train.objectives.base import Losses, Objective
from spvla.train.scoring import Inputs, ReferenceOutput

COMPARED = r"""objective\s*(==|!=)|objective in [(\[{]\s*["']"""

pytestmark = pytest.mark.usefixtures("one_thread")


class Imitate(Objective):
    """Behaviour cloning of what the reference policy proposes."""

    label = "imitate"

    @property
    def has_reference(self) -> bool:
        return True

    def answer(self, family: Family, inputs: Inputs, uniforms: Tensor) -> ReferenceOutput:
        return family.propose(inputs, self.sampler, uniforms)

    def losses(
        self, family: Family, inputs: Inputs, reference: ReferenceOutput | None, columns: Columns, patches: Tensor
    ) -> Losses:
        pair = family.score_pair(inputs, reference.generated, patches=patches)
        logps = self.sampler.logps(pair.generated, reference.generated)
        return Losses(sample=-logps.sum(-1), measures={"imitated_logps": logps.detach().sum(-1)}, outputs=pair.real)


def test_a_new_objective_is_a_class_and_its_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "imitate", Imitate)
    learner, batch = tiny_learner(StepConfig(objective="imitate", learning_rate=5e-3)), ragged_batch(2)
    rows = [take_step(learner, batch) for _ in range(3)]
    assert rows[0]["total_loss"] == pytest.approx(-rows[0]["imitated_logps"], rel=1e-5)
    assert rows[2]["imitated_logps"] > rows[0]["imitated_logps"]


def test_every_objective_that_the_flag_offers_is_registered() -> None:
    assert set(get_args(config.Objective)) == set(OBJECTIVES)
    assert [objective_of(StepConfig(objective=name)).has_reference for name in ("sft", "spin", "spvla")] == [0, 1, 1]


def test_nobody_compares_an_objectives_name() -> None:
    sources = Path(config.__file__).parent.rglob("*.py")
    assert not [path for path in sources if re.search(COMPARED, path.read_text())]


@pytest.mark.parametrize("name", ["spin", "spvla"])
@pytest.mark.parametrize("flags", [{"use_lora": False}, {"loss_columns": "action"}])
def test_flags_that_self_play_cannot_have_are_refused(name: str, flags: dict) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(flags))} .* with --objective {name}"):
        objective_of(StepConfig(objective=name, **flags))
