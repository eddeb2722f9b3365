"""LIBERO-PRO's tasks in LIBERO's world: they build with the changed objects, settle, and are drawn."""

import numpy as np
import pytest

from spvla.benchmarks import registry
from spvla.benchmarks.libero.assets import AssetSet
from spvla.benchmarks.libero_pro.suites import SUITES
from spvla.benchmarks.registry import BenchmarkFlags
from spvla.errors import UserError

WAIT = np.array([0.0, 0, 0, 0, 0, 0, -1])


def play(suite: str, task: int, assets: AssetSet) -> list[str]:
    """Settles and draws the first init state; returns the names of the things in the world."""
    benchmark = registry.find(suite, BenchmarkFlags(libero_assets=assets.path))
    benchmark.require([(suite, task)])
    env = benchmark.open_env(suite, task)
    try:
        env.reset(0)
        for _ in range(10):
            env.step(WAIT)
        assert env.image().std() > 10
        return [*env.env.objects_dict, *env.env.fixtures_dict]
    finally:
        env.close()


def test_changed_objects_take_the_places_of_liberos(real_assets: AssetSet) -> None:
    things = play("libero_10_object", 2, real_assets)
    assert {"yellow_moka_pot_1", "yellow_stove_1"} <= set(things) and "flat_stove_1" not in things


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("suite", SUITES)
def test_every_task_that_the_package_holds_whole_is_played(suite: str, real_assets: AssetSet) -> None:
    unplayable = 0
    for task in range(10):
        try:
            registry.find(suite, BenchmarkFlags(libero_assets=real_assets.path)).num_init_states(suite, task)
            assert play(suite, task, real_assets)
        except UserError:
            unplayable += 1
    assert unplayable == {"libero_spatial_task": 2, "libero_10_task": 1, "libero_10_object": 1}.get(suite, 0)
