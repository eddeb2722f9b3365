"""Episodes recorded here: the store they become, and the RLDS data set that is written from it."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_parts import NAME, episode

from spvla.config import ExportConfig
from spvla.data import index, layout
from spvla.data.index import ensure_index, require_source
from spvla.data.recorded import export, write_index
from spvla.data.store import FORMAT, INDEX, RECORDING, FrameStore
from spvla.errors import DatasetError, UserError

EPISODES = {f"take_{i}": episode(i, steps=3 + i % 3) for i in range(70)}


def write(root: Path, names: list[str] | None = None) -> FrameStore:
    names = list(EPISODES) if names is None else names
    return FrameStore.open(write_index(names, EPISODES.__getitem__, root, NAME, starts="fresh"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    write(root)
    (root / NAME / RECORDING).write_text('{"starts": "fresh"}')
    return root


def test_every_episode_comes_back_as_it_was_recorded(root: Path) -> None:
    store = FrameStore.open(root / NAME / "index")
    assert len(store.index["shards"]) == 3
    sources = {e.source: e for e in EPISODES.values()}
    for number in range(len(store.episode_lengths)):
        found = store.episode(number)
        expected = sources.pop(found.source)
        assert found.images == expected.images and found.wrist_images == expected.wrist_images
        for name in ("actions", "states", "joint_states"):
            assert np.array_equal(getattr(found, name), getattr(expected, name)), name
        assert found.instruction == expected.instruction
    assert not sources


def test_the_order_of_delivery_does_not_matter(root: Path, tmp_path: Path) -> None:
    other = write(tmp_path, list(reversed(EPISODES)))
    store = FrameStore.open(root / NAME / "index")
    assert other.digest == store.digest
    order = [store.episode(number).source for number in range(len(EPISODES))]
    assert order != [e.source for e in EPISODES.values()]  # no task fills the last 5%


def test_a_recorded_index_is_used_as_it_is(root: Path) -> None:
    assert ensure_index(root, NAME) == root / NAME / "index"  # would ask for Ray, and for shards, to build one
    require_source(root, NAME)
    with pytest.raises(DatasetError, match="holds no data set other"):
        require_source(root, "other")


def test_an_index_in_a_form_of_the_past_says_what_to_do(tmp_path: Path) -> None:
    folder = write(tmp_path, ["take_0"]).folder
    old = json.loads((folder / INDEX).read_text()) | {"format": FORMAT - 1}
    (folder / INDEX).write_text(json.dumps(old))
    with pytest.raises(DatasetError, match="was recorded in format .* Record it again"):
        ensure_index(tmp_path, NAME)


def test_no_episode_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no episodes"):
        write(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_store_that_was_cut_short(tmp_path: Path) -> None:
    def read(name: str) -> object:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_index(["take_0"], read, tmp_path, NAME)  # type: ignore[arg-type]
    assert not list((tmp_path / NAME).iterdir())


def test_an_exported_data_set_indexes_to_the_same_store(root: Path, tmp_path: Path) -> None:
    export(ExportConfig(data_root_dir=root, dataset_name=NAME, out=tmp_path))
    assert (tmp_path / NAME / RECORDING).read_text() == '{"starts": "fresh"}'
    source, folder = layout.find(tmp_path, NAME), tmp_path / NAME / "index"
    folder.mkdir()
    for shard in source.shards:
        index.index_shard(shard, folder, skip_corrupt=False)
    index.finish(folder, source)
    ours, theirs = FrameStore.open(root / NAME / "index"), FrameStore.open(folder)
    assert ours.statistics == theirs.statistics
    assert ours.statistics[NAME]["starts"] == "fresh"
    assert ours.episode_lengths == theirs.episode_lengths
    assert all(a.equals(b) for a, b in zip(ours.batches, theirs.batches, strict=True))


def test_what_was_not_recorded_here_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no data set that was recorded here"):
        export(ExportConfig(data_root_dir=tmp_path, dataset_name=NAME))
