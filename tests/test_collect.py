"""`spvla collect` and `spvla regenerate` on a real cluster with real environments; the tally that decides takes."""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from data_parts import episode

from spvla.benchmarks.libero.assets import AssetSet, resolve
from spvla.benchmarks.libero.env import LiberoEnv
from spvla.benchmarks.libero.experts import demonstrate
from spvla.benchmarks.libero.starts import initial_start
from spvla.collect import Request, collect, record, regenerate, require_no_crash, write
from spvla.config import CollectConfig, RegenerateConfig
from spvla.data.index import ensure_index
from spvla.data.spool import Spool
from spvla.data.store import RECORDING, FrameStore
from spvla.errors import DatasetError, InfrastructureError, UserError
from spvla.takes import ENOUGH_CRASHES, Tally
from spvla.types import Episode

DATASET = "libero_object_no_noops"


@pytest.fixture
def assets() -> AssetSet:
    return resolve()


def episodes(root: Path) -> list[Episode]:
    store = FrameStore.open(ensure_index(root, DATASET))
    return [store.episode(number) for number in range(len(store.episode_lengths))]


def test_a_failure_makes_one_more_take_due_and_the_first_successes_are_kept() -> None:
    task = ("libero_goal", 4)
    tally = Tally({task: 2}, {task: 10}, {})
    assert [tally.next(None), tally.due(task)] == [(task, 0), 0]
    tally.running |= {(task, 0), (task, 1)}
    assert tally.next(task) is None  # two are wanted and two are under way
    tally.running -= {(task, 0)}
    tally.done[task, 0] = False
    assert tally.next(task) == (task, 2)
    tally.running.clear()
    tally.done.update({(task, 2): True, (task, 1): True, (task, 3): True})
    assert tally.next(task) is None
    assert list(tally.kept()) == [(task, 1), (task, 2)]


def test_an_idle_worker_stays_with_its_task_and_a_task_is_given_up_at_its_limit() -> None:
    one, other = ("libero_goal", 0), ("libero_object", 0)
    tally = Tally({one: 1, other: 1}, {one: 2, other: 2}, {})
    assert tally.next(other) == (other, 0)
    tally.done.update({(other, 0): False, (other, 1): False})
    assert tally.next(other) == (one, 0)


def test_a_crash_makes_one_more_take_due_and_only_many_end_the_recording() -> None:
    task = ("libero_10", 0)
    tally = Tally({task: 3}, {task: 100}, {(task, 0): True})
    tally.running = {(task, 1), (task, 2)}
    tally.crash((task, 1), "a wall fell")
    assert tally.next(None) == (task, 3)
    tally.done = {(task, k): True for k in range(2, 2 + ENOUGH_CRASHES)}
    for k in range(20, 19 + ENOUGH_CRASHES):
        tally.crash((task, k), "another")
    with pytest.raises(InfrastructureError, match="11 takes crashed, the last one so: the roof"):
        tally.crash((task, 99), "the roof")


def test_a_task_without_demonstrations_is_an_error_now_and_at_every_later_start(
    tmp_path: Path, assets: AssetSet
) -> None:
    request = Request(suite="libero_object", origin="experts", assets=assets, wanted={0: 1, 4: 1}, how={})
    spool = Spool(tmp_path / "takes")
    spool.put(0, 0, episode(0))
    write(request, spool, [(0, 0)], tmp_path)
    for _ in range(2):
        with pytest.raises(DatasetError, match="libero_object_no_noops has no demonstration of tasks 4; expected"):
            record([request], lambda: None, tmp_path, 1)
    whole = replace(request, wanted={0: 1})
    (tmp_path / DATASET).rename(tmp_path / "away")
    spool = Spool(tmp_path / "takes")
    spool.put(0, 0, episode(0))
    write(whole, spool, [(0, 0)], tmp_path)
    record([whole], lambda: None, tmp_path, 1)


def test_a_task_whose_takes_crashed_is_tried_again() -> None:
    task = ("libero_goal", 0)
    tally = Tally({task: 1}, {task: 3}, {})
    tally.crashed[task, 0] = "no memory"
    with pytest.raises(InfrastructureError, match="libero_goal task 0 crashed.*tries again"):
        require_no_crash(tally)
    tally.done[task, 1] = True
    require_no_crash(tally)


def test_a_damaged_take_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spool = Spool(tmp_path)
    for take in range(4):
        spool.put(3, take, episode(take))
    spool.put(3, 4, None)
    whole = (tmp_path / "task_03_take_0001.npz").read_bytes()
    (tmp_path / "task_03_take_0000.npz").write_bytes(b"")
    (tmp_path / "task_03_take_0001.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "task_03_take_0002.npz").write_bytes(whole[:3000] + b"\xff" * 8 + whole[3008:])
    with pytest.raises(DatasetError, match=r"task_03_take_0001.npz is damaged .*Run the same command again"):
        spool.read("task_03_take_0001")
    assert Spool(tmp_path).takes() == {(3, 3): True, (3, 4): False}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.endswith("it is made again") for line in lines)
    assert not (tmp_path / "task_03_take_0001.npz").exists()


def test_a_full_disk_is_one_line_and_leaves_no_half_take(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    (tmp_path / f".task_00_take_0000.npz.{os.getpid()}.tmp").symlink_to("/dev/full")  # where a take is written first
    with pytest.raises(UserError, match="takes no more .No space left on device.; expected a disk with room"):
        spool.put(0, 0, episode(0))
    assert spool.takes() == {} and not list(tmp_path.iterdir())


def test_an_unknown_task_or_suite_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tasks 10; expected 0 to 9 in libero_object"):
        collect(CollectConfig(tasks=(10,), data_root_dir=tmp_path / "data"))
    with pytest.raises(UserError, match="suite libero_moon"):
        collect(CollectConfig(task_suite_name="libero_object,libero_moon", data_root_dir=tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_a_data_set_of_another_origin_is_never_overwritten(tmp_path: Path, assets: AssetSet) -> None:
    """Not even where this very request was once interrupted, and the other was put there since."""
    (tmp_path / DATASET / "1.0.0").mkdir(parents=True)
    how = {"starts": "fresh", "noise": 0.0, "noise_share": 0.0, "seed": 7}
    request = Request(suite="libero_object", origin="experts", assets=assets, wanted={0: 1}, how=how)
    takes = tmp_path / f".{DATASET}.{request.digest}.takes"
    for _ in range(2):
        with pytest.raises(DatasetError, match="already exists and was made from something else"):
            collect(CollectConfig(tasks=(0,), num_demos_per_task=1, data_root_dir=tmp_path))
        takes.mkdir(exist_ok=True)
    assert not list((tmp_path / DATASET / "1.0.0").iterdir())


def test_collect_writes_a_data_set_and_the_same_command_again_finds_it_done(
    tmp_path: Path, assets: AssetSet, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CollectConfig(tasks=(1,), num_demos_per_task=1, data_root_dir=tmp_path, num_workers=1)
    collect(config)
    (episode,) = episodes(tmp_path)
    assert episode.instruction == "pick up the cream cheese and place it in the basket"
    assert len(episode.images) == len(episode.wrist_images) == len(episode.actions) <= 280
    assert "drawn start, seed 7, take 0" in episode.source
    note = json.loads((tmp_path / DATASET / RECORDING).read_text())
    assert note["assets"] == {"name": assets.name, "digest": assets.digest}
    assert not list(tmp_path.glob(".*.takes"))
    assert "100.0%  pick up the cream cheese" in capsys.readouterr().out
    collect(config)
    assert "already recorded" in capsys.readouterr().out
    assert (note["starts"], note["noise"], note["seed"]) == ("fresh", 0.0, 7)
    with pytest.raises(DatasetError, match=r"was made from something else \(starts fresh, not test\)"):
        collect(replace(config, starts="test"))


def test_a_suite_that_is_there_is_left_as_it_is_and_the_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Takes that were made before an interruption are enough; no actor is needed."""
    root = tmp_path / "data"
    config = CollectConfig(
        task_suite_name="libero_goal,libero_10", tasks=(0,), num_demos_per_task=2, data_root_dir=root
    )
    monkeypatch.setattr("spvla.collect.connection", nullcontext)
    asked: list[dict] = []

    def gather(tally: Tally, spools: dict, make: object, num_workers: int) -> None:
        asked.append(dict(tally.wanted))
        for (suite, task), count in tally.wanted.items():
            for take in range(1, 1 + count):
                spools[suite].put(task, take, episode(take, source=suite))
                tally.done[(suite, task), take] = True

    monkeypatch.setattr("spvla.collect.gather", gather)
    collect(replace(config, task_suite_name="libero_goal"))
    collect(config)
    assert asked == [{("libero_goal", 0): 2}, {("libero_10", 0): 2}]
    for suite in ("libero_goal", "libero_10"):
        store = FrameStore.open(ensure_index(root, f"{suite}_no_noops"))
        assert [store.episode(i).source for i in range(2)] == [suite, suite]
    assert not list(root.glob(".*"))
    assert "libero_10 " in capsys.readouterr().out.splitlines()[-3]


def test_regenerate_drops_noops_and_failures(tmp_path: Path, assets: AssetSet, ray_cluster: None) -> None:
    with LiberoEnv("libero_object", 1, assets) as env:
        found = demonstrate(env, initial_start(env, 0), np.random.default_rng([7, 1, 0]))
        assert found is not None
        good, state, name = found.actions, env.init_states[0], env.task_name
    padded = np.repeat(good, np.where(np.arange(len(good)) % 20 == 0, 2, 1), axis=0)
    padded[np.flatnonzero((padded[1:] == padded[:-1]).all(axis=1)) + 1, :6] = 0  # each repeated step asks nothing
    demos = [padded, good[:40]]
    folder = tmp_path / "demos"
    folder.mkdir()
    with h5py.File(folder / f"{name}_demo.hdf5", "w") as opened:
        for number, steps in enumerate(demos):
            opened[f"data/demo_{number}/actions"] = steps.astype(np.float64)
            opened[f"data/demo_{number}/states"] = np.tile(state, (len(steps), 1))
    regenerate(RegenerateConfig(demos=folder, task_suite_name="libero_object", data_root_dir=tmp_path, num_workers=1))
    (episode,) = episodes(tmp_path)
    assert len(padded) > len(good)
    assert np.array_equal(episode.actions, good)
    assert episode.source == f"{name}_demo.hdf5#demo_0"
