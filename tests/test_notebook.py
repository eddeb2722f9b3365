"""What a notebook uses: the names of the package itself."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeBenchmark

import spvla
from spvla.benchmarks import registry
from spvla.benchmarks.registry import BenchmarkFlags
from spvla.errors import UserError


class Moves(FakeBenchmark):
    suites = ("moves",)

    def __init__(self, flags: BenchmarkFlags) -> None:
        super().__init__()


def test_importing_brings_in_nothing() -> None:
    script = "import spvla, sys; print(*spvla.__all__); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    names, modules = (line.split() for line in done.stdout.splitlines())
    assert names == sorted(names) and not {"torch", "ray", "numpy", "mujoco", "tensorflow"} & set(modules)


@pytest.mark.parametrize("name", spvla.__all__)
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    assert len(getattr(spvla, name).__doc__.strip().splitlines()) >= 1 and name in dir(spvla)


def test_another_name_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'spvla' has no attribute 'nobody'"):
        spvla.nobody  # noqa: B018


def test_a_world_may_be_stepped_through_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BENCHMARKS, "one number", f"{__name__}:Moves")
    env = spvla.open_env("moves", 1)
    env.reset(0)
    right = np.array([0.75, 0, 0, 0, 0, 0, -1])
    assert [env.step(right) for _ in range(3)] == [False, False, True]  # beyond 2
    assert env.image().shape == (256, 256, 3)
    with pytest.raises(UserError, match="task 10 of moves; expected 0 to 9"):
        spvla.open_env("moves", 10)


def test_flags_of_an_evaluation_are_checked_as_the_commands_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--num_trials_per_task 0"):
        spvla.evaluate("tiny", num_trials_per_task=0, local_log_dir=tmp_path)
    with pytest.raises(UserError, match="no policy to evaluate"):
        spvla.evaluate(local_log_dir=tmp_path)
    assert not list(tmp_path.iterdir())
