"""Indexing: built once, completed after a failure, made again where the source changed."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_parts import NAME, corrupt, episode, flip_byte, index_here, shard_files, write

from spvla import cli
from spvla.config import IndexConfig
from spvla.data import index, layout
from spvla.data.index import ensure_index
from spvla.data.store import FORMAT, FrameStore
from spvla.errors import DatasetError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set of six episodes in three shards, not yet indexed."""
    write(tmp_path, [episode(i) for i in range(6)], shards=3)
    return tmp_path


def arrow_files(root: Path) -> list[Path]:
    return sorted((root / NAME / "index").glob("*.arrow"))


def times(paths: list[Path]) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in paths}


@pytest.mark.usefixtures("ray_cluster")
def test_a_corrupt_shard_is_named_and_the_other_shards_need_not_be_read_again(root: Path) -> None:
    shard = shard_files(root / NAME / "1.0.0")[1]
    whole = shard.read_bytes()
    corrupt(shard, record=1)
    with pytest.raises(DatasetError, match=rf"{shard.name} record 1 of 2: the checksum"):
        ensure_index(root, NAME, num_workers=1)
    with pytest.raises(DatasetError, match="holds no whole index"):
        FrameStore.open(root / NAME / "index")
    before = times(arrow_files(root))
    assert [n.split("-")[2] for n in before] == ["00000"]

    shard.write_bytes(whole)
    store = FrameStore.open(ensure_index(root, NAME))
    assert len(store) == 24
    after = times(arrow_files(root))
    assert len(after) == 3 and before.items() <= after.items()


@pytest.mark.usefixtures("ray_cluster")
def test_the_command_skips_corrupt_records_when_told_and_says_how_many(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = shard_files(root / NAME / "1.0.0")[2]
    corrupt(shard, record=0)
    index.index(IndexConfig(data_root_dir=root, dataset_name=NAME, skip_corrupt=True))
    out = capsys.readouterr().out
    assert "5 episodes, 20 frames" in out and f"skipped  {shard.name} record" in out
    assert ensure_index(root, NAME, skip_corrupt=True)
    with pytest.raises(DatasetError, match="--skip_corrupt"):  # an index with gaps is not taken for a whole one
        ensure_index(root, NAME)


@pytest.mark.usefixtures("ray_cluster")
def test_indexing_in_parallel_gives_what_one_process_gives(root: Path, tmp_path: Path) -> None:
    store = FrameStore.open(ensure_index(root, NAME))
    alone = index_here(root)
    assert store.digest == alone.digest and store.statistics == alone.statistics
    assert [store[i].image for i in range(24)] == [alone[i].image for i in range(24)]


def test_an_index_that_is_current_is_left_alone(root: Path) -> None:
    index_here(root)
    before = times(arrow_files(root))
    ensure_index(root, NAME)  # would ask for Ray if it had work to do
    assert times(arrow_files(root)) == before


def test_an_index_of_an_older_format_is_made_again_with_one_line(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = index_here(root).folder / "index.json"
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    assert len(FrameStore.open(ensure_index(root, NAME))) == 24
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(f"has format 1: made again in format {FORMAT}, which keeps wrist frames and proprio")


def is_current(root: Path) -> list[bool]:
    source = layout.find(root, NAME)
    return [index.is_current(root / NAME / "index", s, skip_corrupt=False) for s in source.shards]


def test_a_changed_source_is_noticed_and_changes_the_digest(root: Path) -> None:
    old = index_here(root)
    write(root, [episode(i) for i in range(1, 7)], shards=3)
    assert not all(is_current(root))
    new = index_here(root)
    assert all(is_current(root))
    assert new.digest != old.digest


def test_a_source_that_was_only_touched_keeps_its_files(root: Path) -> None:
    old = index_here(root)
    before = times(arrow_files(root))
    for shard in shard_files(root / NAME / "1.0.0"):
        os.utime(shard)
    assert not any(is_current(root))
    assert index_here(root).digest == old.digest
    assert times(arrow_files(root)) == before and all(is_current(root))


def test_a_damaged_index_file_is_made_again(root: Path) -> None:
    index_here(root)
    damaged = arrow_files(root)[1]
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert is_current(root) == [True, False, True]
    assert len(index_here(root)) == 24


def test_files_of_shards_that_the_source_no_longer_has_are_removed(root: Path) -> None:
    index_here(root)
    write(root, [episode(i) for i in range(6)], shards=2)
    assert len(index_here(root)) == 24
    assert len(arrow_files(root)) == 2


def test_a_disk_that_fills_up_leaves_no_half_written_file(root: Path) -> None:
    source, folder = layout.find(root, NAME), root / NAME / "index"
    folder.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # no file may grow further, as on a full disk
    try:
        with pytest.raises(DatasetError, match="cannot be written"):
            index.index_shard(source.shards[0], folder, False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(folder.iterdir()) == []
    assert len(index_here(root)) == 24


def test_a_folder_that_cannot_be_made_is_named(root: Path) -> None:
    (root / NAME / "index").write_text("a file in its place")
    with pytest.raises(DatasetError, match=f"{NAME}/index cannot be written"):
        ensure_index(root, NAME)


def test_a_source_without_a_readable_episode_makes_no_index(root: Path) -> None:
    for shard in shard_files(root / NAME / "1.0.0"):
        flip_byte(shard, 2)
    with pytest.raises(DatasetError, match=r"no readable episode in its train split \(6 skipped\)"):
        index_here(root, skip_corrupt=True)
    assert not (root / NAME / "index/index.json").exists()


def test_what_a_killed_task_left_is_removed_later(root: Path) -> None:
    folder = root / NAME / "index"
    folder.mkdir()
    old, new = folder / ".a.arrow.1.tmp", folder / ".b.arrow.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    index_here(root)
    assert not old.exists() and new.exists()  # the newer may still be written to


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_stopped(tmp_path: Path) -> None:
    write(tmp_path, [episode(i, steps=120) for i in range(60)], shards=12)
    command = [sys.executable, "-m", "spvla.cli", "index", "--data_root_dir", str(tmp_path), "--dataset_name", NAME]
    command += ["--num_workers", "1"]
    entries = tmp_path / NAME / "index"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as first:
        while not list(entries.glob("*.arrow.json")):
            assert first.poll() is None
            time.sleep(0.01)
        os.killpg(first.pid, signal.SIGKILL)
    assert not (entries / "index.json").exists()
    done = times([p.with_suffix("") for p in entries.glob("*.arrow.json")])
    assert 0 < len(done) < 12
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    after = times(arrow_files(tmp_path))
    assert len(after) == 12 and done.items() <= after.items()
    assert len(FrameStore.open(entries)) == 60 * 120


def test_an_unknown_data_set_ends_the_command_with_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["index", "--data_root_dir", str(root), "--dataset_name", "libero_object_noops"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"spvla: {root} holds no data set libero_object_noops; expected one of {NAME}. "
        "Correct --dataset_name or --data_root_dir, or make one with spvla collect."
    ]


def test_training_never_imports_tensorflow() -> None:
    code = "import sys, spvla.data.index, spvla.data.loader; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
