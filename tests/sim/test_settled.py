"""The settled tasks, played here, against stock LIBERO's: positions to 1e-9 m, shrunk frames to one level."""

from pathlib import Path

import numpy as np
import pytest

from spvla.benchmarks.libero.assets import AssetSet
from spvla.benchmarks.libero.env import LiberoEnv
from spvla.benchmarks.libero.world import SUITES, WAIT, WAIT_STEPS, difference, load, shrink
from spvla.benchmarks.libero.world_check import settle
from spvla.render.context import renderer_name


def test_a_task_settles_and_looks_as_in_stock_libero(real_assets: AssetSet) -> None:
    place = ("libero_spatial", 5)  # whose bowl falls onto a ramekin's edge
    found = difference(settle(place, real_assets), load()[place])
    assert found.mm <= 1e-6 and (found.levels <= 1 or "llvmpipe" not in renderer_name())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("suite", SUITES)
def test_all_forty_tasks_settle_and_look_as_in_stock_libero(suite: str, real_assets: AssetSet, golden: Path) -> None:
    if "llvmpipe" not in renderer_name():
        pytest.skip(f"the reference was drawn by llvmpipe, not {renderer_name()}")
    stock = np.load(golden / "world.npz")
    places = sorted({key.rsplit("/", 1)[0] for key in stock.files if key.startswith(f"{suite}/")})
    assert len(places) == 20
    for place in places:
        _, task, init_state = place.split("/")
        with LiberoEnv(suite, int(task), real_assets) as env:
            env.reset(int(init_state))
            for _ in range(WAIT_STEPS):
                env.step(WAIT)
            bodies = [env.model.body(str(name)).id for name in stock[f"{place}/bodies"]]
            assert np.abs(env.data.xpos[bodies] - stock[f"{place}/xpos"]).max() <= 1e-9, place
            assert np.abs(env.data.xmat[bodies][:, 6:] - stock[f"{place}/xmat_z"]).max() <= 1e-9, place
            frame = shrink(env.image(), 32).astype(int)
            assert np.abs(frame - stock[f"{place}/agentview32"]).max() <= 1, place
