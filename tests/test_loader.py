"""The loader: every sample once an epoch, resumable to the exact sample, and the original's tokens and images."""

import json
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data_parts import NAME, SENTENCES, episode, index_here, write
from tokenizers import Tokenizer

from spvla.data.loader import BLOCK, Loader, Stream, shares
from spvla.data.store import FrameStore
from spvla.errors import DatasetError
from spvla.policies.openvla import actions
from spvla.policies.openvla.images import (
    augment,
    crop_center,
    decode_jpeg,
    draw_augmentation,
    resize_lanczos,
)
from spvla.policies.openvla.prompt import PAD, build_tiny_tokenizer, load_tokenizer
from spvla.types import Batch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets: of 20 episodes and 80 frames, 76 of them for training; and of 11 episodes and 22 frames."""
    root = tmp_path_factory.mktemp("data")
    write(root, [episode(i) for i in range(20)], shards=2)
    write(root, [episode(100 + i, steps=2) for i in range(11)], name="other")
    index_here(root)
    index_here(root, "other")
    return root


@pytest.fixture
def store(root: Path) -> FrameStore:
    return FrameStore.open(root / NAME / "index")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tiny_tokenizer()


@pytest.fixture
def loader(store: FrameStore, tokenizer: Tokenizer):  # type: ignore[no-untyped-def]
    """Makes a Loader over the first data set."""

    def make(**changes: object) -> Loader:
        fields: dict = {"batch_size": 4, "seed": 7, "image_aug": False, "workers": 0}
        return Loader([store], tokenizer, **(fields | changes))

    return make


def numbers(batches: list[Batch]) -> list[int]:
    return [int(n) for b in batches for n in b.samples]


def equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch))


def global_order(loaders: list[Loader], steps: int) -> list[int]:
    """What all ranks together hand out, step by step."""
    iterators = [iter(x) for x in loaders]
    return [int(n) for _ in range(steps) for it in iterators for n in next(it).samples]


# --- which sample when ---


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 4), (3, 5), (4, 1)])
def test_an_epoch_holds_every_frame_once_over_any_number_of_workers(
    loader, world_size: int, batch_size: int, store: FrameStore
) -> None:
    steps = -(-3 * 76 // (world_size * batch_size))
    ranks = [loader(rank=r, world_size=world_size, batch_size=batch_size) for r in range(world_size)]
    order = global_order(ranks, steps)
    epochs = [order[76 * e : 76 * (e + 1)] for e in range(3)]
    assert all(sorted(e) == list(store.split("train")) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_depends_on_the_seed_alone(loader) -> None:
    one = global_order([loader()], 20)
    assert one == global_order([loader(rank=r, world_size=2, batch_size=2) for r in range(2)], 20)
    assert one != global_order([loader(seed=8)], 20)


def test_a_resumed_run_goes_on_with_the_very_next_sample(loader) -> None:
    whole = list(islice(loader(image_aug=True), 25))  # past the end of the first epoch
    first = loader(image_aug=True, workers=2)
    batches = list(islice(first, 9))
    state = json.loads(json.dumps(first.state_dict()))
    again = loader(image_aug=True, workers=2)
    again.load_state_dict(state)
    batches += list(islice(again, 16))
    assert len(batches) == len(whole) and all(map(equal, batches, whole))


def test_a_run_resumed_with_more_workers_misses_and_repeats_nothing(loader) -> None:
    two = [loader(rank=r, world_size=2) for r in range(2)]
    order = global_order(two, 5)
    assert two[0].state_dict() == two[1].state_dict()
    three = [loader(rank=r, world_size=3, batch_size=2, start_sample=two[0].state_dict()["sample"]) for r in range(3)]
    order += global_order(three, 12)
    assert order == global_order([loader(batch_size=1)], len(order))


def test_threads_change_nothing(loader) -> None:
    alone = list(islice(loader(image_aug=True), 12))
    for workers in (1, 3):
        assert all(map(equal, alone, islice(loader(image_aug=True, workers=workers), 12)))


def test_the_state_counts_what_was_handed_out_not_what_was_prepared(loader) -> None:
    ahead = loader(workers=2, prefetch=6)
    next(it := iter(ahead))
    assert ahead.state_dict()["sample"] == 4
    next(it)
    assert ahead.state_dict()["sample"] == 8 and ahead.epoch == 8 / 76


def test_another_seed_or_changed_data_cannot_be_resumed(loader) -> None:
    state = loader().state_dict()
    with pytest.raises(DatasetError, match="seed 8"):
        loader().load_state_dict(state | {"seed": 8})
    with pytest.raises(DatasetError, match="digests"):
        loader().load_state_dict(state | {"digests": ["0"]})


# --- validation ---


def test_validation_hands_out_each_held_out_frame_once(loader, store: FrameStore) -> None:
    val = [list(loader(split="val", rank=r, world_size=2, batch_size=2)) for r in range(2)]
    assert sorted(numbers(val[0] + val[1])) == list(store.split("val")) == [76, 77, 78, 79]
    assert numbers(list(loader(split="val"))) == numbers(list(loader(split="val", workers=2)))


def test_training_never_sees_a_held_out_frame_unless_told(loader, store: FrameStore) -> None:
    held_out = set(store.split("val"))
    assert not held_out & set(global_order([loader()], 100))
    assert held_out <= set(global_order([loader(val_split_from_train=False)], 100))


def test_an_empty_validation_split_is_refused(loader) -> None:
    with pytest.raises(DatasetError, match="the val split of libero_object_no_noops is empty"):
        loader(split="val", val_split_from_train=False)


# --- several data sets ---


def test_weights_are_shares_of_the_samples(root: Path, tokenizer: Tokenizer) -> None:
    stores = [FrameStore.open(root / name / "index") for name in (NAME, "other")]
    both = Loader(stores, tokenizer, weights=[1, 3], batch_size=50, seed=0, image_aug=False, workers=2)
    order = numbers(list(islice(both, 8)))
    second = [n for n in order if n >= 80]
    assert 0.68 < len(second) / len(order) < 0.82
    assert sorted(second[:20]) == sorted(second[20:40]) == list(range(80, 100))  # its own epochs: 20 of 22 frames


def test_shares_are_exact_in_every_block() -> None:
    stream = Stream((1000, 50), (1.0, 4.0), 3)
    for block in (0, 7):
        places = [stream.place(s) for s in range(block * BLOCK, (block + 1) * BLOCK)]
        assert sum(p.dataset == 1 for p in places) == 8000


def test_each_data_set_walks_through_whole_epochs() -> None:
    stream = Stream((1000, 30), (1.0, 4.0), 3)
    places = [stream.place(s) for s in range(BLOCK // 2)]
    second = [p.position for p in places if p.dataset == 1]
    whole = [second[i : i + 30] for i in range(0, len(second) - 30, 30)]
    assert len(whole) > 100 and all(sorted(e) == list(range(30)) for e in whole)
    assert [p.epoch for p in places if p.dataset == 1] == [i // 30 for i in range(len(second))]


@pytest.mark.parametrize("weights", [(1, 1, 1), (1e-9, 1), (0.2, 0.3, 0.5), (5, 1e-7, 1e-7, 3)])
def test_shares_sum_to_a_block_and_leave_no_one_out(weights: tuple[float, ...]) -> None:
    assert sum(shares(weights)) == BLOCK and min(shares(weights)) >= 1


# --- what is in a batch ---


def test_a_batch_by_hand(loader, store: FrameStore, tokenizer: Tokenizer) -> None:
    batch = next(iter(loader()))
    for row, number in enumerate(batch.samples):
        frame = store[int(number)]
        normalised = store.action_stats.normalise(frame.action)
        assert np.array_equal(batch.actions[row], normalised)
        assert np.array_equal(batch.images[row], resize_lanczos(decode_jpeg(frame.image)))
        ids = batch.input_ids[row][batch.attention_mask[row]]
        assert np.array_equal(ids[-8:-1], actions.encode(normalised)) and ids[-1] == 2
        assert np.array_equal(ids[-10:-8], [29901, 29871])
        assert np.array_equal(batch.labels[row][batch.attention_mask[row]][-8:], ids[-8:])
    assert batch.images.dtype == np.uint8 and batch.actions.dtype == np.float32
    assert batch.input_ids.dtype == batch.labels.dtype == batch.samples.dtype == np.int64


def test_shorter_prompts_are_padded_on_the_right(root: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sentences = ("open it", "pick up the alphabet soup and place it in the basket")
    write(tmp_path, [replace(episode(i), instruction=sentences[i % 2]) for i in range(2)])
    store = index_here(tmp_path)
    batch = next(iter(Loader([store], tokenizer, batch_size=8, seed=0, image_aug=False)))
    short = batch.attention_mask.sum(1) < batch.input_ids.shape[1]
    assert short.sum() == 4  # one of the two episodes
    for row in np.flatnonzero(short):
        length = batch.attention_mask[row].sum()
        assert batch.attention_mask[row, :length].all() and not batch.attention_mask[row, length:].any()
        assert (batch.input_ids[row, length:] == PAD).all() and (batch.labels[row, length:] == -100).all()


def test_augmentation_is_drawn_for_each_frame_and_epoch(loader, store: FrameStore) -> None:
    stream = islice(loader(image_aug=True, batch_size=1), 2 * 76)
    images = {}
    for k, batch in enumerate(stream):
        images[k // 76, int(batch.samples[0])] = batch.images[0]
    plain = resize_lanczos(decode_jpeg(store[5].image))
    drawn = draw_augmentation(np.random.default_rng((7, 0, 1, 5)))  # seed, data set, epoch, frame
    assert np.array_equal(images[1, 5], augment(plain, drawn))
    assert not np.array_equal(images[0, 5], images[1, 5])


def test_validation_shows_the_middle_when_training_augments(loader, store: FrameStore) -> None:
    batch = next(iter(loader(split="val", image_aug=True)))
    plain = resize_lanczos(decode_jpeg(store[int(batch.samples[0])].image))
    assert np.array_equal(batch.images[0], crop_center(plain))


def test_tokens_and_labels_equal_the_originals(golden: Path, tmp_path: Path) -> None:
    import shutil

    name = "libero_spatial_no_noops"
    shutil.copytree(golden / "rlds" / name, tmp_path / name, copy_function=shutil.copyfile)
    (tmp_path / name).chmod(0o755)
    store, z = index_here(tmp_path, name), np.load(golden / "rlds/golden.npz")
    batch = next(iter(Loader([store], load_tokenizer(golden / "model"), batch_size=83, seed=0, image_aug=False)))
    row_of = {int(n): row for row, n in enumerate(batch.samples)}
    for i in range(6):
        trajectory = int(z[f"e2e{i}_traj"])
        row = row_of[sum(store.episode_lengths[:trajectory])]  # its first frame
        kept = batch.attention_mask[row]
        assert np.array_equal(batch.input_ids[row][kept], z[f"e2e{i}_input_ids"])
        assert np.array_equal(batch.labels[row][kept], z[f"e2e{i}_labels"])


def test_a_torn_jpeg_in_the_store_names_the_frame(loader, store: FrameStore, monkeypatch: pytest.MonkeyPatch) -> None:
    get = FrameStore.__getitem__
    monkeypatch.setattr(FrameStore, "__getitem__", lambda s, i: replace(get(s, i), image=get(s, i).image[:500]))
    with pytest.raises(DatasetError, match=r"frame \d+ of .*index: bytes that are no JPEG"):
        next(iter(loader(workers=1)))


def test_the_instructions_reach_the_prompt(loader, tokenizer: Tokenizer) -> None:
    batch = next(iter(loader(batch_size=16)))
    texts = {tokenizer.decode([int(i) for i in ids if i < 31744]) for ids in batch.input_ids}
    assert all(any(s in t for s in SENTENCES) for t in texts)
