"""LeRobotDataset v3: written and read again with the same numbers, and pictures a few levels apart."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_parts import NAME, SENTENCES, episode, index_here, store_of
from PIL import Image

from spvla.config import ExportConfig
from spvla.data import lerobot, lerobot_export
from spvla.data.index import find
from spvla.data.recorded import export
from spvla.data.store import FrameStore
from spvla.errors import DatasetError, UserError
from spvla.policies.openvla.images import decode_jpeg, encode_jpeg

COPY = f"{NAME}_lerobot"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    """Nineteen episodes of 3 to 5 steps."""
    return store_of(tmp_path_factory.mktemp("data"), [episode(i, steps=3 + i % 3) for i in range(19)])


@pytest.fixture(scope="module")
def exported(original: FrameStore) -> Path:
    root = original.folder.parent.parent
    export(ExportConfig(data_root_dir=root, dataset_name=NAME, format="lerobot"))
    return root / COPY


@pytest.fixture
def root(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    import shutil

    shutil.copytree(exported, tmp_path / COPY)
    return tmp_path


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Lets `change` alter a parquet file's rows."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def edit_info(root: Path, **changes: object) -> None:
    path = root / COPY / lerobot.INFO
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- there and back ---


def test_all_numbers_come_back_and_pictures_a_few_levels_apart(original: FrameStore, root: Path) -> None:
    store = index_here(root, COPY)
    assert store.episode_lengths == original.episode_lengths and store.instructions == original.instructions
    for name in ("actions", "proprio", "joint_states"):
        assert np.array_equal(getattr(store, name), getattr(original, name)), name
    assert store.statistics[COPY] == original.statistics[NAME]
    for camera in original.cameras:
        apart = [
            np.abs(decode_jpeg(store.jpeg(i, camera)).astype(int) - decode_jpeg(original.jpeg(i, camera)))
            for i in range(len(store))
        ]
        assert np.mean(apart) < 1.5 and np.max(apart) <= 16


def test_parts_are_read_apart_and_share_no_episode(root: Path) -> None:
    source = find(root, COPY)
    assert [len(part.episodes) for part in source.shards] == [16, 3]
    digests = {part.content_digest() for part in source.shards}
    assert len(digests) == 2
    assert digests == {part.content_digest() for part in find(root, COPY).shards}


def test_videos_and_rows_are_divided_among_files(
    original: FrameStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_export, "VIDEO_FRAMES", 12)
    monkeypatch.setattr(lerobot_export, "DATA_ROWS", 30)
    monkeypatch.setattr(lerobot_export, "FILES_PER_CHUNK", 2)
    folder = lerobot_export.export(original, tmp_path / COPY)
    assert sorted(p.parent.name for p in (folder / "data").rglob("*.parquet")) == [
        "chunk-000",
        "chunk-000",
        "chunk-001",
    ]
    assert len(list((folder / "videos").rglob("*.mp4"))) == 2 * 7
    store = index_here(tmp_path, COPY)
    assert np.array_equal(store.actions, original.actions) and store.episode_lengths == original.episode_lengths


def test_consecutive_episodes_are_grouped_up_to_a_size() -> None:
    assert list(lerobot_export.groups([3, 4, 5, 20, 1], 9)) == [[0, 1], [2], [3], [4]]


def test_stored_pictures_and_the_fields_other_names_are_read(original: FrameStore, root: Path) -> None:
    """As in converted sets without video: PNG or JPEG in the rows, the wrist called wrist_image, no joint states."""
    (path,) = (root / COPY / "data").rglob("*.parquet")
    table = pq.read_table(path).drop_columns(["observation.joint_state"])
    for camera, key in (("agentview", "observation.images.image"), ("robot0_eye_in_hand", WRIST)):
        pictures = [picture(original, i, camera, jpeg=camera == "agentview") for i in range(len(original))]
        table = table.append_column(key, pa.array([{"bytes": data, "path": None} for data in pictures]))
    pq.write_table(table, path)
    info = json.loads((root / COPY / lerobot.INFO).read_text())
    kept = {k: v for k, v in info["features"].items() if "images" not in k and k != "observation.joint_state"}
    image = {"dtype": "image", "shape": [256, 256, 3], "names": ["height", "width", "channel"]}
    edit_info(root, features=kept | {"observation.images.image": image, WRIST: image}, video_path=None)
    store = index_here(root, COPY)
    assert all(bytes(store.jpeg(i, "agentview")) == original[i].image for i in range(len(store)))  # as they were
    wrist = decode_jpeg(original.jpeg(3, "robot0_eye_in_hand"))
    assert bytes(store.jpeg(3, "robot0_eye_in_hand")) == encode_jpeg(wrist)
    assert store.joint_states is None


WRIST = "observation.images.wrist_image"


def picture(store: FrameStore, i: int, camera: str, *, jpeg: bool) -> bytes:
    if jpeg:
        return bytes(store.jpeg(i, camera))
    file = io.BytesIO()
    Image.fromarray(decode_jpeg(store.jpeg(i, camera))).save(file, "PNG")
    return file.getvalue()


def test_a_split_for_validation_is_used(root: Path) -> None:
    edit_info(root, splits={"train": "0:17", "val": "17:19"})
    store = index_here(root, COPY)
    assert len(store.split("val")) == sum(store.episode_lengths[17:])


# --- bad input ---


def test_another_version_says_how_to_convert_it(root: Path) -> None:
    edit_info(root, codebase_version="v2.1")
    with pytest.raises(DatasetError, match="has version v2.1; expected a LeRobotDataset v3. Convert it"):
        find(root, COPY)


def test_a_missing_video_is_named_before_anything_is_read(root: Path) -> None:
    (video,) = (root / COPY / "videos/observation.images.image2").rglob("*.mp4")
    video.unlink()
    with pytest.raises(DatasetError, match=f"{video.name} is missing"):
        find(root, COPY)


def test_a_video_shorter_than_its_rows_names_the_episode(root: Path) -> None:
    for key in ("from_timestamp", "to_timestamp"):
        name = f"videos/observation.images.image/{key}"
        (path,) = (root / COPY / "meta/episodes").rglob("*.parquet")
        rewrite(path, lambda rows, name=name: rows[18].update({name: rows[18][name] + 0.1}))
    with pytest.raises(DatasetError, match=r"episode 18: file-000.mp4 shows 1 frames from 3.70 s on; expected 3"):
        index_here(root, COPY)


def test_a_damaged_video_is_named(root: Path) -> None:
    (video,) = (root / COPY / "videos/observation.images.image").rglob("*.mp4")
    video.write_bytes(b"no video")
    with pytest.raises(DatasetError, match="episode 0: .*file-000.mp4 cannot be read"):
        index_here(root, COPY)


def test_episodes_that_are_corrupt_can_be_skipped(root: Path) -> None:
    (path,) = (root / COPY / "data").rglob("*.parquet")
    rewrite(path, lambda rows: rows.pop(4))
    with pytest.raises(DatasetError, match="episode 1: 3 rows; expected 4"):
        index_here(root, COPY)
    store = index_here(root, COPY, skip_corrupt=True)
    assert len(store.episode_lengths) == 18 and "episode 1: 3 rows" in store.index["skipped"][0]


def test_features_that_are_not_liberos_are_named(root: Path) -> None:
    info = json.loads((root / COPY / lerobot.INFO).read_text())
    features = info["features"]
    edit_info(root, features=features | {"action": {"dtype": "float32", "shape": [6]}})
    with pytest.raises(DatasetError, match=r"action has shape \[6\]; expected \[7\]"):
        find(root, COPY)
    edit_info(root, features={k: v for k, v in features.items() if k != "observation.images.image"})
    with pytest.raises(DatasetError, match="has pictures observation.images.image2; expected one of"):
        find(root, COPY)


def test_a_gripper_of_another_convention_is_refused(root: Path) -> None:
    path = root / COPY / "meta/stats.json"
    stats = json.loads(path.read_text())
    stats["action"]["min"][6] = 0.0
    path.write_text(json.dumps(stats))
    with pytest.raises(DatasetError, match="gripper actions from 0.0 on; expected LIBERO's own"):
        find(root, COPY)


def test_paths_that_lead_out_of_the_data_set_are_refused(root: Path) -> None:
    edit_info(root, data_path="../../{chunk_index}/{file_index}.parquet")
    with pytest.raises(DatasetError, match="expected files inside it"):
        find(root, COPY)


def test_no_folder_but_an_older_export_is_replaced(original: FrameStore, exported: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    data = original.folder.parent.parent
    with pytest.raises(UserError, match="exists and is no LeRobotDataset"):
        export(ExportConfig(data_root_dir=data, dataset_name=NAME, format="lerobot", out=tmp_path))
    assert set(pq.read_table(exported / "meta/tasks.parquet")["task"].to_pylist()) == set(SENTENCES)
