"""TFDS in and out: equal to the original's files, and one clear error for each way a file can be wrong."""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from data_parts import NAME, corrupt, episode, flip_byte, frame, index_here, shard_files, write

from spvla.data import layout, rlds
from spvla.errors import DatasetError
from spvla.policies.openvla.actions import ActionStats, env_to_dataset
from spvla.policies.openvla.images import decode_jpeg, resize_lanczos
from spvla.types import Episode


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Root of a data set of six episodes in one shard."""
    write(tmp_path, [episode(i) for i in range(6)])
    return tmp_path


def read(root: Path, name: str = NAME, skipped: list[str] | None = None) -> list[Episode]:
    return list(rlds.read_episodes(layout.find(root, name).shards, skipped=skipped))


def only_shard(root: Path) -> Path:
    (path,) = shard_files(root / NAME / "1.0.0")
    return path


def same(a: Episode, b: Episode) -> bool:
    arrays = ("states", "joint_states", "actions")
    rest = ("images", "wrist_images", "instruction", "source")
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in arrays) and all(
        getattr(a, k) == getattr(b, k) for k in rest
    )


# --- equal to the original ---


@pytest.fixture(scope="module")
def original(golden: Path) -> tuple[list[Episode], dict[str, np.ndarray]]:
    episodes = read(golden / "rlds", "libero_spatial_no_noops")
    return episodes, dict(np.load(golden / "rlds/golden.npz"))


def test_the_originals_trajectories_are_read_in_order(original: tuple[list[Episode], dict[str, np.ndarray]]) -> None:
    episodes, z = original
    assert len(episodes) == 20
    for i, e in enumerate(episodes[:19]):
        assert np.array_equal(e.actions, z[f"traj{i}_raw_action"])
        assert e.instruction == str(z[f"traj{i}_lang"])


def test_the_originals_actions_are_normalised_alike(
    original: tuple[list[Episode], dict[str, np.ndarray]], golden: Path
) -> None:
    episodes, z = original
    statistics = json.loads((golden / "rlds/dataset_statistics.json").read_text())
    stats = ActionStats.from_json(statistics["libero_spatial_no_noops"]["action"])
    for i, e in enumerate(episodes[:19]):
        assert np.array_equal(stats.normalise(env_to_dataset(e.actions)), z[f"traj{i}_action"])


def test_the_originals_frames_pass_through_and_decode_alike(
    original: tuple[list[Episode], dict[str, np.ndarray]],
) -> None:
    episodes, z = original
    every = {image for e in episodes for image in e.images}
    for i in (0, 1):
        assert z[f"jpeg{i}"].tobytes() in every
        assert np.array_equal(resize_lanczos(decode_jpeg(z[f"jpeg{i}"].tobytes())), z[f"resized{i}"])


def test_what_is_written_has_the_originals_features(golden: Path, small: Path) -> None:
    theirs = golden / "rlds/libero_spatial_no_noops/1.0.0/features.json"
    ours = small / NAME / "1.0.0/features.json"
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


def test_rewriting_the_originals_records_gives_the_same_bytes(golden: Path, tmp_path: Path) -> None:
    import tensorflow as tf

    (theirs,) = layout.find(golden / "rlds", "libero_spatial_no_noops").shards
    features = rlds.libero_features()
    for _, record in rlds.read_records(theirs, None):
        again = rlds.serialise(features, rlds.to_episode(record))
        assert tf.train.Example.FromString(again) == tf.train.Example.FromString(record)


# --- round trip ---


def test_episodes_survive_a_round_trip_with_their_jpeg_bytes(small: Path) -> None:
    found = {e.source: e for e in read(small)}
    assert len(found) == 6
    assert all(same(found[f"demo_{i}.hdf5"], episode(i)) for i in range(6))


def test_plain_tfds_reads_what_is_written(small: Path) -> None:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(small / NAME / "1.0.0"))
    assert builder.info.splits["train"].num_examples == 6
    expected = {f"demo_{i}.hdf5": episode(i) for i in range(6)}
    for record in builder.as_dataset(split="train"):
        e = expected[record["episode_metadata"]["file_path"].numpy().decode()]
        steps = list(record["steps"])
        assert np.array_equal([s["action"] for s in steps], e.actions)
        assert np.array_equal(steps[2]["observation"]["image"], decode_jpeg(e.images[2]))
        assert [float(s["reward"]) for s in steps] == [0, 0, 0, 1]
        assert [bool(s["is_first"]) for s in steps] == [True, False, False, False]
        assert [bool(s["is_terminal"]) for s in steps] == [False, False, False, True]


def test_the_order_of_delivery_does_not_matter(tmp_path: Path) -> None:
    episodes = [episode(i) for i in range(8)]
    one, other = (write(tmp_path / n, e, shards=2) for n, e in (("a", episodes), ("b", episodes[::-1])))
    assert [p.read_bytes() for p in shard_files(one)] == [p.read_bytes() for p in shard_files(other)]


def test_the_same_episodes_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = (
        "import hashlib, data_parts as d; from spvla.data import rlds; "
        "print(hashlib.sha256(rlds.serialise(rlds.libero_features(), d.episode(3))).hexdigest())"
    )
    here = hashlib.sha256(rlds.serialise(rlds.libero_features(), episode(3))).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, check=True)
    assert there.stdout.decode().strip() == here


def test_shards_named_after_another_builder_are_found(small: Path) -> None:
    path = only_shard(small)
    path.rename(path.with_name(path.name.replace(NAME, "liber_o10")))
    assert len(read(small)) == 6


def test_the_newest_version_is_read(small: Path) -> None:
    shutil.copytree(small / NAME / "1.0.0", small / NAME / "1.10.0")
    shutil.copytree(small / NAME / "1.0.0", small / NAME / "1.9.0")
    assert layout.find(small, NAME).folder.name == "1.10.0"


# --- bad input ---


def test_a_corrupt_record_is_named(small: Path) -> None:
    corrupt(only_shard(small), record=2)
    with pytest.raises(DatasetError, match="00000-of-00001 record 2 of 6: the checksum.*--skip_corrupt"):
        read(small)


def test_a_corrupt_record_can_be_skipped_and_is_counted(small: Path) -> None:
    corrupt(only_shard(small), record=2)
    skipped: list[str] = []
    assert len(read(small, skipped=skipped)) == 5
    assert len(skipped) == 1 and "checksum" in skipped[0]


@pytest.mark.parametrize("record", [b"\xff" * 40, b"no example"])
def test_a_whole_record_that_is_no_episode_is_named_or_skipped(small: Path, record: bytes) -> None:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(only_shard(small))) as writer:
        for _ in range(6):
            writer.write(record)
    with pytest.raises(DatasetError, match="record 0 of 6: it is no episode"):
        read(small)
    skipped: list[str] = []
    assert read(small, skipped=skipped) == [] and len(skipped) == 6


def test_a_folder_beside_the_versions_is_none(small: Path) -> None:
    version = layout.find(small, NAME).folder
    shutil.copytree(version, version.with_name(f"{version.name}.bak"))
    assert layout.find(small, NAME).folder == version


def test_after_a_corrupt_length_the_rest_of_the_shard_is_counted_as_skipped(small: Path) -> None:
    flip_byte(only_shard(small), 2)
    skipped: list[str] = []
    assert read(small, skipped=skipped) == []
    assert len(skipped) == 6


@pytest.mark.parametrize("lost_bytes", [1, 1000, 100_000])
def test_a_truncated_shard_is_named(small: Path, lost_bytes: int) -> None:
    path = only_shard(small)
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    with pytest.raises(DatasetError, match=rf"{path.name} record \d of 6"):
        read(small)
    skipped: list[str] = []
    assert len(read(small, skipped=skipped)) + len(skipped) == 6


def test_a_shard_cut_between_records_is_noticed(small: Path) -> None:
    path = only_shard(small)
    path.write_bytes(path.read_bytes()[: rlds.next_offset(path, 0)])
    with pytest.raises(DatasetError, match="record 1 of 6: the file ends before it"):
        read(small)


def test_a_missing_shard_is_named(small: Path) -> None:
    only_shard(small).unlink()
    with pytest.raises(DatasetError, match=r"0 files \*-train.tfrecord-00000-of-00001"):
        read(small)


def edit_features(root: Path, change: Callable[[dict], None]) -> None:
    """Lets `change` alter the features of a step in features.json."""
    path = root / NAME / "1.0.0/features.json"
    features = json.loads(path.read_text())
    change(features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"])
    path.write_text(json.dumps(features))


def test_wrong_feature_names_are_listed(small: Path) -> None:
    def rename(steps: dict) -> None:
        cameras = steps["observation"]["featuresDict"]["features"]
        cameras["rgb"] = cameras.pop("image")

    edit_features(small, rename)
    with pytest.raises(DatasetError, match="lacks steps/observation/image .*it has .*steps/observation/rgb"):
        read(small)


def test_a_data_set_may_lack_what_plain_openvla_does_not_look_at(small: Path) -> None:
    import tensorflow as tf

    def drop(steps: dict) -> None:
        for name in ("wrist_image", "state", "joint_state"):
            del steps["observation"]["featuresDict"]["features"][name]

    edit_features(small, drop)
    records = [record for _, record in rlds.read_records(layout.find(small, NAME).shards[0], None)]
    with tf.io.TFRecordWriter(str(only_shard(small))) as writer:
        for record in records:
            example = tf.train.Example.FromString(record)
            for name in ("wrist_image", "state", "joint_state"):
                del example.features.feature[f"steps/observation/{name}"]
            writer.write(example.SerializeToString())
    episodes = read(small)
    assert len(episodes) == 6
    for e in episodes:
        assert not e.wrist_images and e.states.shape == (0, 8) and e.joint_states.shape == (0, 7)
    store = index_here(small)
    assert store.cameras == ("agentview",) and store.proprio is None


def test_actions_declared_of_another_dimension_are_refused(small: Path) -> None:
    edit_features(small, lambda steps: steps["action"]["tensor"]["shape"].update(dimensions=["6"]))
    with pytest.raises(DatasetError, match=r"steps/action has shape \(6,\)"):
        read(small)


def test_frames_declared_of_another_size_are_refused(small: Path) -> None:
    def shrink(steps: dict) -> None:
        image = steps["observation"]["featuresDict"]["features"]["image"]["image"]
        image["shape"]["dimensions"] = ["128", "128", "3"]

    edit_features(small, shrink)
    with pytest.raises(DatasetError, match=r"steps/observation/image has shape \(128, 128, 3\)"):
        read(small)


def serialise_unchecked(e: Episode, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(rlds, "check_episode", lambda _: None)
    return rlds.serialise(rlds.libero_features(), e)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.full((4, 7), np.nan, np.float32)}, "steps/action is NaN or infinite at step 0"),
        ({"images": [frame(0), frame(0, size=128)] * 2}, "frame of step 1 is 128 x 128"),
        ({"images": [frame(0), b"\x89PNG no jpeg", *[frame(0)] * 2]}, "frame of step 1 is no JPEG"),
        ({"instruction": " "}, "empty language_instruction"),
    ],
)
def test_a_bad_episode_is_refused_by_name(changes: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = serialise_unchecked(episode(0, **changes), monkeypatch)
    with pytest.raises(DatasetError, match=message):
        rlds.to_episode(record)


def test_actions_of_another_dimension_are_refused() -> None:
    import tensorflow as tf

    example = tf.train.Example.FromString(rlds.serialise(rlds.libero_features(), episode(0)))
    del example.features.feature["steps/action"].float_list.value[24:]
    with pytest.raises(DatasetError, match="steps/action has 24 values for 4 steps"):
        rlds.to_episode(example.SerializeToString())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.full((4, 7), np.inf, np.float32)}, "actions with NaN or infinity"),
        ({"actions": np.zeros((4, 6), np.float32)}, r"actions of shape \(4, 6\)"),
        ({"wrist_images": [frame(0)]}, "1 wrist frames"),
        ({"images": [frame(0, size=64)] * 4}, "64 x 64"),
        ({"instruction": ""}, "without instruction"),
    ],
)
def test_a_bad_episode_is_not_written_and_leaves_nothing(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        rlds.write_dataset(iter([episode(0), episode(1, **changes)]), tmp_path, NAME)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_no_episodes_make_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no episodes"):
        rlds.write_dataset(iter([]), tmp_path, NAME)
    assert not (tmp_path / NAME / "1.0.0").exists()


def test_an_empty_data_set_is_refused(small: Path) -> None:
    path = small / NAME / "1.0.0/dataset_info.json"
    path.write_text(path.read_text().replace('"6"', '"0"'))
    with pytest.raises(DatasetError, match="no episodes in its train split"):
        layout.find(small, NAME)


def test_an_unknown_data_set_is_answered_with_those_that_exist(small: Path) -> None:
    with pytest.raises(DatasetError, match=f"no data set libero_goal_no_noops; expected one of {NAME}"):
        layout.find(small, "libero_goal_no_noops")


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (50_000, hard)
    )  # no file may grow further: writing fails as on a full disk
    try:
        with pytest.raises(DatasetError, match="cannot be written"):
            rlds.write_dataset(iter([episode(i) for i in range(6)]), tmp_path, NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_an_interrupted_rewrite_leaves_the_older_data_set_whole(small: Path) -> None:
    def torn() -> Iterator[Episode]:
        yield episode(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rlds.write_dataset(torn(), small, NAME)
    assert len(read(small)) == 6
