"""The embedded asset set: it loads in LIBERO's own classes, takes their init states, and stands still."""

import os
from pathlib import Path

import mujoco
import numpy as np
import pytest

from spvla.benchmarks.libero import primitives
from spvla.benchmarks.libero.assets import AssetSet
from spvla.benchmarks.libero.env import LiberoEnv

WAIT = np.array([0.0, 0, 0, 0, 0, 0, -1])
SOME = [("libero_object", 0), ("libero_spatial", 4), ("libero_10", 9)]
ALL = [(s, t) for s in ("libero_spatial", "libero_object", "libero_goal", "libero_10") for t in range(10)]
# LIBERO's own tall bottles stand in the table of these scenes' init states, and jump out of it
JUMPING = [("libero_10", 0), ("libero_10", 1), ("libero_10", 7)]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> AssetSet:
    folder = tmp_path_factory.mktemp("primitives")
    primitives.write(folder)
    return AssetSet(name="primitives", path=folder, digest=primitives.DIGEST)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        primitives.write(tmp_path / name)
    first = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    second = {p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert first == second and len(first) > 40
    assert sum(map(len, first.values())) < 2**20


@pytest.mark.parametrize("path", sorted(p for p in primitives.contents() if p.endswith(".xml")))
def test_every_file_compiles_alone(path: str, assets: AssetSet) -> None:
    model = mujoco.MjModel.from_xml_path(os.fspath(assets.path / path))
    assert model.ngeom > 0 and model.nmesh == 0


def object_positions(env: LiberoEnv) -> np.ndarray:
    return np.array([env.data.xpos[env.env.obj_body_id[name]] for name in env.env.objects_dict])


def comes_to_rest(env: LiberoEnv, init_state: int) -> bool:
    """Whether after ten settling steps all has fallen, hardly slid, and stays. LIBERO drops some bowls by 7 cm."""
    env.reset(init_state)
    start = object_positions(env)
    success = [env.step(WAIT) for _ in range(10)]
    settled = object_positions(env)
    for _ in range(10):
        success.append(env.step(WAIT))
    later = object_positions(env)
    assert not any(success), f"init state {init_state} succeeds by itself"
    fell = np.abs(settled[:, 2] - start[:, 2]).max()
    slid = np.linalg.norm((settled - start)[:, :2], axis=1).max()
    return bool(fell < 0.17 and slid < 0.03 and np.linalg.norm(later - settled, axis=1).max() < 0.01)


@pytest.mark.parametrize(("suite", "task"), SOME)
def test_init_states_apply_and_objects_come_to_rest(suite: str, task: int, assets: AssetSet) -> None:
    with LiberoEnv(suite, task, assets) as env:
        assert comes_to_rest(env, 0) and comes_to_rest(env, 49)


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "task"), [place for place in ALL if place not in JUMPING])
def test_nearly_all_init_states_of_every_task_come_to_rest(suite: str, task: int, assets: AssetSet) -> None:
    """The furniture's draws are no part of an init state, so some drop a bowl onto a plate's edge. That upsets 8 of the
    50 of libero_spatial's first task, with LIBERO's own objects 7."""
    with LiberoEnv(suite, task, assets) as env:
        assert sum(not comes_to_rest(env, init_state) for init_state in range(50)) <= 8
