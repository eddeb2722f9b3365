"""The indexed store: every frame where it belongs, statistics equal to the original's, damage noticed."""

import json
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_parts import NAME, SENTENCES, copy_dataset, episode, index_here, store_of, write

from spvla.data import layout, rlds
from spvla.data.store import INDEX, FrameStore, statistics_of, without_proprio
from spvla.errors import DatasetError
from spvla.policies.openvla.actions import env_to_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty episodes of 2 to 5 frames in three shards, indexed."""
    root = tmp_path_factory.mktemp("data")
    write(root, [episode(i, steps=2 + i % 4) for i in range(20)], shards=3)
    index_here(root)
    return root


@pytest.fixture
def store(root: Path) -> FrameStore:
    return FrameStore.open(root / NAME / "index")


def test_every_frame_is_where_its_episode_has_it(root: Path, store: FrameStore) -> None:
    i = 0
    for number, e in enumerate(rlds.read_episodes(layout.find(root, NAME).shards)):
        for t in range(len(e.images)):
            frame = store[i]
            assert (frame.episode, frame.step, frame.instruction) == (number, t, e.instruction)
            assert (frame.image, frame.wrist_image) == (e.images[t], e.wrist_images[t])
            assert np.array_equal(frame.proprio, e.states[t]) and frame.proprio.dtype == np.float32
            assert np.array_equal(frame.action, env_to_dataset(e.actions[t])) and frame.action.dtype == np.float32
            i += 1
    assert i == len(store) == 70
    assert sum(store.episode_lengths) == 70 and len(store.episode_lengths) == 20


def test_a_frame_that_is_not_there_is_an_index_error(store: FrameStore) -> None:
    for i in (-1, 70):
        with pytest.raises(IndexError):
            store[i]


def test_a_store_travels_to_other_processes_and_threads(store: FrameStore) -> None:
    again = pickle.loads(pickle.dumps(store))
    assert again[33].image == store[33].image
    found: dict[int, bytes] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: store[i].image})) for i in range(70)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(found[i] == store[i].image for i in range(70))


def test_the_last_5_percent_of_episodes_are_held_out_as_tfds_rounds(store: FrameStore) -> None:
    train, val = store.split("train"), store.split("val")
    assert (train.start, train.stop, val.stop) == (0, val.start, 70)
    assert store[val.start].episode == 19 and store[val.start].step == 0  # round(0.95 x 20)


def test_holding_out_can_be_switched_off(store: FrameStore) -> None:
    assert store.split("train", val_split_from_train=False) == range(70)
    assert len(store.split("val", val_split_from_train=False)) == 0


def test_a_validation_split_of_the_source_is_used_instead(tmp_path: Path) -> None:
    folder = write(tmp_path, [episode(i) for i in range(20)])
    other = write(tmp_path / "other", [episode(100), episode(101)])
    info = json.loads((folder / "dataset_info.json").read_text())
    (train,) = info["splits"]
    info["splits"] = [train | {"name": "val", "shardLengths": ["2"]}, train]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    shutil.copy(next(other.glob("*.tfrecord-*")), folder / f"{NAME}-val.tfrecord-00000-of-00001")
    store = index_here(tmp_path)
    assert store.split("train") == range(80)
    assert store.split("val") == range(80, 88)
    assert store.statistics[NAME]["num_trajectories"] == 22  # as in the original: over all splits


def test_statistics_equal_the_originals_in_every_field(golden: Path, tmp_path: Path) -> None:
    name = "libero_spatial_no_noops"
    copy_dataset(golden / "rlds" / name, tmp_path / name)
    store = index_here(tmp_path, name)
    plain = {name: without_proprio(store.statistics[name])}  # what a checkpoint of OpenVLA gets
    assert plain == json.loads((golden / "rlds/dataset_statistics.json").read_text())


def test_statistics_by_hand() -> None:
    actions, proprio = np.zeros((101, 7), np.float32), np.zeros((101, 8), np.float32)
    actions[:, 0], proprio[:, 7] = np.arange(101), np.arange(101) * 2
    found = statistics_of(actions, proprio, trajectories=3)
    first = {k: v[0] for k, v in found["action"].items()}
    assert first == pytest.approx(
        {"mean": 50, "std": np.sqrt(850), "min": 0, "max": 100, "q01": 1, "q99": 99, "mask": True}
    )
    assert found["action"]["mask"] == [True] * 6 + [False]
    assert (found["num_transitions"], found["num_trajectories"]) == (101, 3)
    assert found["proprio"]["q99"] == [0.0] * 7 + [198.0] and "mask" not in found["proprio"]
    assert without_proprio(found)["proprio"]["q99"] == [0.0] * 7
    assert statistics_of(actions, None, trajectories=3) == without_proprio(found)


def test_statistics_are_of_the_transformed_actions(store: FrameStore) -> None:
    action = store.statistics[NAME]["action"]
    assert (action["min"][6], action["max"][6]) == (0.0, 1.0)  # gripper 1 open, 0 closed
    assert store.action_stats.q99.tolist() == action["q99"]


def test_a_policys_own_statistics_go_on_where_it_has_some_for_these_data(root: Path) -> None:
    store = FrameStore.open(root / NAME / "index")
    held = json.loads(json.dumps(store.statistics[NAME]))
    held["action"]["q99"] = [2 * q + 1 for q in held["action"]["q99"]]
    held["proprio"] = {key: [0.0] * 7 for key in held["proprio"]}  # a plain policy's: no states
    store.adopt_statistics(held)
    assert store.action_stats.q99.tolist() == held["action"]["q99"]
    assert store.statistics[NAME]["proprio"] == FrameStore.open(store.folder).statistics[NAME]["proprio"]


def test_columns_in_memory_are_those_of_the_frames(store: FrameStore) -> None:
    assert np.array_equal(store.actions, [store[i].action for i in range(70)])
    assert np.array_equal(store.proprio, [store[i].proprio for i in range(70)])
    assert [store.instructions[e] for e in store.episodes] == [store[i].instruction for i in range(70)]
    assert store.cameras == ("agentview", "robot0_eye_in_hand")


def test_what_a_data_set_lacks_is_none(tmp_path: Path) -> None:
    bare = store_of(tmp_path, [replace(episode(0), wrist_images=[], states=np.zeros((0, 8), np.float32)), episode(1)])
    assert bare.cameras == ("agentview",) and bare.proprio is None
    assert bare[0].wrist_image is None and bare[0].proprio is None
    assert bare.statistics[NAME]["proprio"]["q99"] == [0.0] * 7


def test_current_frames_have_a_whole_chunk_ahead(tmp_path: Path) -> None:
    store = store_of(tmp_path, [episode(i, steps=steps) for i, steps in enumerate((2, 5, 3))])
    for chunk, expected in ((1, [*range(10)]), (3, [2, 3, 4, 7]), (5, [2]), (6, [])):
        found = store.current_frames("train", chunk=chunk, val_split_from_train=False)
        assert found.tolist() == expected


def test_both_instructions_are_kept(store: FrameStore) -> None:
    assert {store[i].instruction for i in range(len(store))} == set(SENTENCES)


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """An index that a test may damage."""
    return Path(shutil.copytree(root / NAME / "index", tmp_path / "index"))


def test_a_half_written_index_is_none(copy: Path) -> None:
    (copy / INDEX).unlink()
    with pytest.raises(DatasetError, match="holds no whole index"):
        FrameStore.open(copy)


def test_a_truncated_file_is_named(copy: Path) -> None:
    path = sorted(copy.glob("*.arrow"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DatasetError, match=f"{path.name} is damaged"):
        FrameStore.open(copy)


def test_a_lost_file_is_named(copy: Path) -> None:
    path = sorted(copy.glob("*.arrow"))[2]
    path.unlink()
    with pytest.raises(DatasetError, match=f"{path.name} is damaged"):
        FrameStore.open(copy)


def test_an_index_of_another_format_is_refused(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text(json.dumps(index | {"format": 0}))
    with pytest.raises(DatasetError, match="format 0"):
        FrameStore.open(copy)
