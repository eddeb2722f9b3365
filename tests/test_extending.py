"""The examples of docs/extending.md, each written to a file as a maintainer would, registered and used."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from selfplay_parts import ragged_batch, take_step, tiny_learner

from spvla.benchmarks import registry as benchmarks
from spvla.benchmarks.libero import primitives
from spvla.benchmarks.libero.assets import resolve
from spvla.benchmarks.libero.suites import tasks
from spvla.benchmarks.registry import BenchmarkFlags, find
from spvla.config import StepConfig
from spvla.errors import CheckpointError
from spvla.eval.episode import run_trial
from spvla.policies import registry as policies
from spvla.policies.registry import describe, load_policy
from spvla.train.objectives import OBJECTIVES
from spvla.types import ONE_STEP, Observation, Status, Trial

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"^```python (\w+)\.py\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE))
LONGEST = 60

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every example, where Python finds them."""
    for name, code in EXAMPLES.items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_six_questions_have_an_example_that_fits_on_a_page() -> None:
    assert len(EXAMPLES) == len(re.findall(r"^## ", TEXT, re.MULTILINE)) == 6
    assert {name: n for name, code in EXAMPLES.items() if (n := len(code.splitlines())) > LONGEST} == {}


@pytest.mark.usefixtures("folder")
def test_a_suite_is_found_by_name_and_played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmarks.BENCHMARKS, "moves", "moves:Moves")
    benchmark = find("moves", BenchmarkFlags())
    outcome = run_trial(
        benchmark.open_env("moves", 1),
        lambda seen: np.full((1, 7), 0.25),
        Trial(policy="p", suite="moves", task=1, init_state=3),
        needs=ONE_STEP,
        num_steps_wait=0,
        center_crop=False,
        max_steps=benchmark.max_steps("moves"),
    )
    assert (outcome.status, outcome.steps) == (Status.SUCCESS, 10)  # from -0.3, in steps of 0.25, past 2
    assert benchmarks.describe(benchmark.facts()) == "moves along a line, version 1"


def test_a_family_opens_its_own_folders_and_leaves_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "FAMILIES", {"constant": "constant", **policies.FAMILIES})
    for kind in ("constant", "unheard_of"):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps({"model_type": kind, "action": [0.5] * 7}))
    policy = load_policy(folder / "constant")
    image = np.zeros((224, 224, 3), np.uint8)
    seen = Observation(images=(image, image), instruction="move", proprio=np.zeros(8, np.float32))
    assert np.array_equal(policy.act([seen, seen], unnorm_key="moves"), np.full((2, 4, 7), 0.5))
    with pytest.raises(CheckpointError):
        describe(folder / "unheard_of")


@pytest.mark.usefixtures("folder")
def test_an_objective_learns_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "imitate", example("imitate").Imitate)
    learner, batch = tiny_learner(StepConfig(objective="imitate", learning_rate=5e-3)), ragged_batch(2)
    rows = [take_step(learner, batch) for _ in range(3)]
    assert rows[0]["total_loss"] == pytest.approx(-rows[0]["imitated_logps"], rel=1e-5)
    assert rows[2]["imitated_logps"] > rows[0]["imitated_logps"]


# In a process of its own, because it draws: Mesa's renderer and TensorFlow crash in one.
DRAWS = """
import numpy as np
from plain import PlainRenderer
from slider import Slider
from spvla.render.rendering import Renderer

def red(image):
    r, g, b = image.astype(int).transpose(2, 0, 1)
    return np.argwhere((r > 60) & (g < r // 2) & (b < r // 2)).mean(0)  # (row, column) of the ball

for renderer in (PlainRenderer, Renderer):
    env = Slider(renderer)
    env.reset(0)
    begin, before = env.state_digest(), env.image()
    kept = env.moment()
    steps = next(n for n in range(200) if env.step(np.array([10.0] + [0.0] * 6)))
    assert 3 < steps < 100, steps
    after = env.image()
    assert before.shape == (256, 256, 3) and before.dtype == np.uint8
    assert red(after)[1] > red(before)[1] + 20, (renderer, red(before), red(after))
    assert red(before)[0] < 128, "the ball, below the middle, is in the first rows"
    assert np.array_equal(env.image_at(kept), before)
    env.reset(0)
    assert env.state_digest() == begin
    env.close()
print("drawn")
"""


def test_a_simulator_steps_and_either_renderer_draws_it(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DRAWS], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.stdout == "drawn\n", done.stderr


def test_a_set_of_assets_is_another_one_by_its_content(folder: Path) -> None:
    example("bright").write(folder / "bright")
    found = resolve(folder / "bright")
    assert found.name == f"bright-{found.digest[:8]}"
    assert found.digest != primitives.DIGEST
    found.require(tasks("libero_object"))
