"""The farm on real Ray, its worlds and policy being fakes: exactly once, whatever dies."""

import os
import signal
from pathlib import Path

import pytest
from fakes import FakeEnv
from farm_parts import fake_farm, job, open_ledger, trials

from spvla.config import FarmConfig
from spvla.farm.run import Run

pytestmark = pytest.mark.usefixtures("ray_cluster")
CONFIG = FarmConfig(num_envs=2, num_videos=0, max_failure_videos=0, call_timeout_s=20)


def test_every_trial_is_played_and_comes_out_as_it_must(tmp_path: Path) -> None:
    wanted = trials(tasks=2, init_states=3)
    with open_ledger(tmp_path, wanted) as ledger, fake_farm(tmp_path, CONFIG) as (farm, _):
        Run(farm, job(wanted), ledger).play()
        rows = ledger.trials()
    assert [r.status for r in rows] == ["success"] * 6
    # steps of 0.2 from -0.01 i until x > 1 + task
    assert [r.steps for r in rows] == [6, 6, 6, 11, 11, 11]
    assert {r.worker for r in rows} == {"env-0", "env-1"}


def deadly_env(suite: str, task: int, assets: object) -> FakeEnv:
    """Dies of each signal once, by a mark on the disk, at init states 0 to 3."""

    class Deadly(FakeEnv):
        def reset(self, init_state: int) -> None:
            super().reset(init_state)
            signals = [signal.SIGKILL, signal.SIGFPE, signal.SIGSEGV, signal.SIGSTOP]
            mark = Path(os.environ["FARM_MARKS"]) / str(init_state)
            if init_state < 4 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signals[init_state])

    return Deadly()


def test_death_by_any_signal_is_an_error_and_the_trial_is_played_elsewhere(tmp_path: Path) -> None:
    wanted = trials(tasks=1, init_states=6)

    def env(suite: str, task: int, assets: object, marks: str = str(tmp_path)) -> FakeEnv:
        os.environ["FARM_MARKS"] = marks
        return deadly_env(suite, task, assets)

    config = FarmConfig(num_envs=2, num_videos=0, max_failure_videos=0, call_timeout_s=3)
    with open_ledger(tmp_path, wanted) as ledger, fake_farm(tmp_path, config, open_env=env) as (farm, _):
        Run(farm, job(wanted), ledger).play()
        assert [r.status for r in ledger.trials()] == ["success"] * 6
        errors = {e.init_state: e for e in ledger.errors()}
    assert sorted(errors) == [0, 1, 2, 3]
    assert [errors[i].kind for i in range(4)] == ["environment died"] * 3 + ["hang"]
    assert "Floating point" in errors[1].message and "Segmentation" in errors[2].message
    assert "reset" in errors[1].traceback
