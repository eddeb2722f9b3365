"""Decoded pictures: the same bits as from the JPEG, made once for all processes, whole or not there, and never left."""

import errno
import fcntl
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data_parts import NAME, episode, index_here, store_of
from training_parts import DATASET, distance, quick_flags, train_here, weights_of, write_toy_dataset

from spvla.data import frames
from spvla.data.frames import DecodedFrames, StoredFrames, available_memory, open_frames
from spvla.data.loader import Loader
from spvla.data.store import FrameStore
from spvla.errors import DatasetError
from spvla.policies.openvla.prompt import build_tiny_tokenizer
from spvla.types import Needs

BOTH = ("agentview", "robot0_eye_in_hand")
GIB = 2**30


@pytest.fixture
def store(tmp_path: Path) -> FrameStore:
    """Three episodes of 15 frames."""
    return store_of(tmp_path, [episode(i, steps=5) for i in range(3)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "frames"


def picture(source: frames.Frames, number: int, camera: str = "agentview") -> np.ndarray:
    out = np.empty((224, 224, 3), np.uint8)
    source.read(number, camera, out)
    return out


def test_decoded_pictures_are_those_of_the_jpegs(store: FrameStore, folder: Path) -> None:
    (decoded,) = open_frames([store], BOTH, "decoded", threads=2, folders=[folder])
    assert isinstance(decoded, DecodedFrames)
    for number in range(15):
        for camera in BOTH:
            assert np.array_equal(picture(decoded, number, camera), picture(StoredFrames(store), number, camera))


def test_a_batch_is_the_same_from_either(store: FrameStore, folder: Path) -> None:
    flags: dict = {"needs": Needs(cameras=BOTH), "batch_size": 4, "seed": 1, "image_aug": True}
    decoded = open_frames([store], BOTH, "decoded", folders=[folder])
    batches = [
        islice(Loader([store], build_tiny_tokenizer(), frames=f, val_split_from_train=False, **flags), 6)
        for f in (decoded, None)
    ]
    for a, b in zip(*batches, strict=True):
        assert np.array_equal(a.images, b.images) and np.array_equal(a.samples, b.samples)


@pytest.mark.usefixtures("one_thread")
def test_a_run_learns_the_same_from_either(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_toy_dataset(tmp_path / "data", episodes=4, steps=3)
    index_here(tmp_path / "data", DATASET)
    monkeypatch.setattr(frames, "own_folders", lambda: (folder,))
    flags: dict = {"image_aug": True, "val_split_from_train": False, "objective": "sft"}
    learned = [
        weights_of(train_here(quick_flags(tmp_path / "data", tmp_path / mode, frames=mode, **flags)))
        for mode in ("decoded", "stored")
    ]
    assert len(list(folder.glob("*.u8"))) == 1 and distance(*learned) == 0


def test_a_second_process_uses_the_same_file(store: FrameStore, folder: Path) -> None:
    first = open_frames([store], BOTH, "decoded", folders=[folder])
    before = {p.name: p.stat().st_ino for p in folder.glob("*.u8")}
    code = (
        "import sys; from pathlib import Path; from spvla.data.frames import open_frames; "
        "from spvla.data.store import FrameStore; "
        f"open_frames([FrameStore.open(Path(sys.argv[1]))], {BOTH!r}, 'decoded', folders=[Path(sys.argv[2])])"
    )
    subprocess.run([sys.executable, "-c", code, str(store.folder), str(folder)], check=True)
    assert {p.name: p.stat().st_ino for p in folder.glob("*.u8")} == before and len(before) == 2
    assert picture(first[0], 3).any()


def test_auto_does_without_where_they_do_not_fit_and_decoded_says_so(store: FrameStore, folder: Path) -> None:
    size = 15 * 150_528
    small = {"folders": [folder], "memory_bytes": int(size / 0.75) - 1}
    assert isinstance(open_frames([store], BOTH[:1], "auto", **small)[0], StoredFrames)
    with pytest.raises(DatasetError, match="for --frames decoded; expected a disk"):
        open_frames([store], BOTH[:1], "decoded", **small)
    assert list(folder.glob("*.u8")) == []
    enough = {"folders": [folder], "memory_bytes": int(size / 0.75) + 1}
    assert isinstance(open_frames([store], BOTH[:1], "auto", **enough)[0], DecodedFrames)


def test_a_folder_that_cannot_be_written_is_passed_over(store: FrameStore, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (decoded,) = open_frames([store], BOTH, folders=[tmp_path / "file", folder])
    assert isinstance(decoded, DecodedFrames) and len(list(folder.glob("*.u8"))) == 2


def test_where_there_are_no_locks_files_are_made_all_the_same_and_left(
    store: FrameStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    (decoded,) = open_frames([store], BOTH[:1], folders=[folder])
    assert isinstance(decoded, DecodedFrames) and picture(decoded, 3).any()
    frames.remove_unused(folder)
    assert len(list(folder.glob("*.u8"))) == 1


def test_files_that_nobody_uses_make_way_and_those_in_use_stay(tmp_path: Path, folder: Path) -> None:
    stores = [store_of(tmp_path / str(i), [episode(i)]) for i in range(3)]
    for i, store in enumerate(stores):
        store.digest = str(i)
    used = open_frames(stores[:1], BOTH[:1], folders=[folder])
    del (gone := open_frames(stores[1:2], BOTH[:1], folders=[folder]))[0]
    (folder / ".half.1.tmp").write_bytes(b"of a killed process")
    open_frames(stores[2:], BOTH[:1], folders=[folder])
    assert sorted(p.name[0] for p in folder.glob("*.u8")) == ["0", "2"] and not list(folder.glob(".*.tmp"))
    assert gone == [] and picture(used[0], 1).any()


def test_in_shared_memory_the_last_one_removes_the_file(
    store: FrameStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "SHARED_MEMORY", folder.parent)
    one, other = (open_frames([store], BOTH[:1], folders=[folder]) for _ in range(2))
    one.clear()
    assert len(list(folder.glob("*.u8"))) == 1
    assert picture(other[0], 2).any()
    other.clear()
    assert list(folder.glob("*.u8")) == []


def test_a_file_of_another_length_is_made_again(store: FrameStore, folder: Path) -> None:
    folder.mkdir()
    (folder / frames.file_name(store, "agentview")).write_bytes(b"cut short")
    (decoded,) = open_frames([store], BOTH[:1], folders=[folder])
    assert np.array_equal(picture(decoded, 7), picture(StoredFrames(store), 7))


def test_a_torn_jpeg_leaves_no_file(store: FrameStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FrameStore.jpeg
    monkeypatch.setattr(FrameStore, "jpeg", lambda s, i, camera: whole(s, i, camera)[: 500 if i == 11 else None])
    with pytest.raises(DatasetError, match=f"frame 11 of .*{NAME}/index: bytes that are no JPEG"):
        open_frames([store], BOTH, folders=[folder], threads=2)
    assert [p.name for p in folder.iterdir()] == [".lock"]


def test_available_memory_is_the_least_of_the_machines_and_the_containers(tmp_path: Path) -> None:
    meminfo, group = tmp_path / "meminfo", tmp_path / "cgroup/job"
    group.mkdir(parents=True)
    meminfo.write_text(f"MemTotal: 99999999 kB\nMemAvailable: {64 * GIB // 1024} kB\n")
    own = tmp_path / "own"
    own.write_text("0::/job\n")
    places = {"meminfo": meminfo, "cgroups": tmp_path / "cgroup", "own": own}
    assert available_memory(**places) == 64 * GIB
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text(f"{5 * GIB}\n")
    assert available_memory(**places) == 64 * GIB
    (group / "memory.max").write_text(f"{20 * GIB}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {2 * GIB}\n")
    assert available_memory(**places) == (20 - 5 + 2) * GIB  # cached files give way


def test_another_users_folder_is_not_used(store: FrameStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert isinstance(open_frames([store], BOTH[:1], folders=[folder])[0], StoredFrames)
