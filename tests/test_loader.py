"""The loader: every sample once an epoch, resumable to the exact sample, and the original's tokens and images."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data_parts import NAME, SENTENCES, copy_dataset, episode, index_here, store_of, write
from tokenizers import Tokenizer

from spvla.data.loader import Loader
from spvla.data.store import FrameStore
from spvla.data.stream import BLOCK, Stream, shares
from spvla.errors import DatasetError, UserError
from spvla.policies.openvla import actions
from spvla.policies.openvla.images import (
    Augmentation,
    augment,
    crop_center,
    decode_jpeg,
    draw_augmentation,
    resize_lanczos,
)
from spvla.policies.openvla.prompt import PAD, build_tiny_tokenizer, load_tokenizer, prompt_ids
from spvla.types import Batch, Needs


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
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch))  # None equals None


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
    batches = list(islice(loader(image_aug=True, workers=2), 9))
    batches += list(islice(loader(image_aug=True, workers=2, start_sample=9 * 4), 16))
    assert len(batches) == len(whole) and all(map(equal, batches, whole))


def test_a_run_resumed_with_more_workers_misses_and_repeats_nothing(loader) -> None:
    order = global_order([loader(rank=r, world_size=2) for r in range(2)], 5)
    three = [loader(rank=r, world_size=3, batch_size=2, start_sample=len(order)) for r in range(3)]
    order += global_order(three, 12)
    assert order == global_order([loader(batch_size=1)], len(order))


def test_threads_change_nothing(loader) -> None:
    alone = list(islice(loader(image_aug=True), 12))
    for workers in (1, 3):
        assert all(map(equal, alone, islice(loader(image_aug=True, workers=workers), 12)))


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
        assert (stream.places(block * BLOCK + np.arange(BLOCK)).dataset == 1).sum() == 8000


def test_each_data_set_walks_through_whole_epochs() -> None:
    stream = Stream((1000, 30), (1.0, 4.0), 3)
    places = stream.places(np.arange(BLOCK // 2))
    mine = places.dataset == 1
    second = places.position[mine].tolist()
    whole = [second[i : i + 30] for i in range(0, len(second) - 30, 30)]
    assert len(whole) > 100 and all(sorted(e) == list(range(30)) for e in whole)
    assert places.epoch[mine].tolist() == [i // 30 for i in range(len(second))]


def test_samples_lie_where_they_lie_whoever_asks_for_them_together() -> None:
    stream = Stream((1000, 30), (1.0, 4.0), 3)
    together = stream.places(np.arange(9_000, 12_000))  # over the border of two blocks
    for k in (0, 999, 1000, 2999):
        alone = stream.places(np.array([9_000 + k]))
        assert all(getattr(alone, f.name)[0] == getattr(together, f.name)[k] for f in fields(alone))


@pytest.mark.parametrize("weights", [(1, 1, 1), (1e-9, 1), (0.2, 0.3, 0.5), (5, 1e-7, 1e-7, 3)])
def test_shares_sum_to_a_block_and_leave_no_one_out(weights: tuple[float, ...]) -> None:
    assert sum(shares(weights)) == BLOCK and min(shares(weights)) >= 1


# --- what is in a batch ---


def test_a_batch_by_hand(loader, store: FrameStore, tokenizer: Tokenizer) -> None:
    batch = next(iter(loader()))
    for row, number in enumerate(batch.samples):
        frame = store[int(number)]
        normalised = store.action_stats.normalise(frame.action)
        assert np.array_equal(batch.actions[row], [normalised])
        assert np.array_equal(batch.images[row], [resize_lanczos(decode_jpeg(frame.image))])
        ids = batch.input_ids[row, : batch.lengths[row]]
        assert ids.tolist() == [*prompt_ids(tokenizer, frame.instruction), *actions.encode(normalised), 2]
    assert batch.proprio is None and batch.augmentation is None
    assert batch.images.dtype == np.uint8 and batch.actions.dtype == np.float32
    assert batch.input_ids.dtype == batch.lengths.dtype == batch.samples.dtype == np.int64


def test_shorter_prompts_are_padded_on_the_right(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sentences = ("open it", "pick up the alphabet soup and place it in the basket")
    write(tmp_path, [replace(episode(i), instruction=sentences[i % 2]) for i in range(2)])
    store = index_here(tmp_path)
    batch = next(iter(Loader([store], tokenizer, batch_size=8, seed=0, image_aug=False)))
    short = batch.lengths < batch.input_ids.shape[1]
    assert short.sum() == 4  # one of the two episodes
    for ids, length in zip(batch.input_ids, batch.lengths, strict=True):
        assert ids[length - 1] == 2 and (ids[length:] == PAD).all() and (ids[:length] != PAD).all()


# --- chunks, the wrist's camera, proprio ---

FOUR = Needs(cameras=("agentview", "robot0_eye_in_hand"), proprio=True, chunk=3, execute=3)


def test_a_chunk_holds_the_actions_from_its_step_on(loader, store: FrameStore, tokenizer: Tokenizer) -> None:
    batch = next(iter(loader(needs=FOUR, batch_size=8)))
    for row, number in enumerate(batch.samples.tolist()):
        frames = [store[number + k] for k in range(3)]
        assert len({f.episode for f in frames}) == 1
        chunk = store.action_stats.normalise(np.array([f.action for f in frames]))
        assert np.array_equal(batch.actions[row], chunk)
        ids = batch.input_ids[row, : batch.lengths[row]]
        assert ids.tolist() == [*prompt_ids(tokenizer, frames[0].instruction), *actions.encode(chunk).ravel(), 2]
        pictures = [resize_lanczos(decode_jpeg(jpeg)) for jpeg in (frames[0].image, frames[0].wrist_image)]
        assert np.array_equal(batch.images[row], pictures)
        assert np.array_equal(batch.proprio[row], store.proprio_stats.for_training(frames[0].proprio))


def test_the_last_steps_of_an_episode_are_never_current(loader) -> None:
    """19 episodes of 4 steps: with chunks of 3 actions each gives 2 samples."""
    chunks = loader(needs=FOUR, batch_size=19)
    assert len(chunks) == 38
    epoch = sorted(global_order([chunks], 2))
    assert epoch == [4 * e + t for e in range(19) for t in (0, 1)]


def test_episodes_shorter_than_a_chunk_give_no_sample(loader) -> None:
    with pytest.raises(DatasetError, match="train split of libero_object_no_noops is empty.*of 5 steps"):
        loader(needs=Needs(chunk=5))


def test_the_cameras_are_augmented_apart(loader, store: FrameStore) -> None:
    batch = next(iter(loader(needs=FOUR, image_aug=True, batch_size=1)))
    number = int(batch.samples[0])
    for c, jpeg in enumerate((store[number].image, store[number].wrist_image)):
        key = (7, 0, 0, number) if c == 0 else (7, 0, 0, number, c)
        drawn = draw_augmentation(np.random.default_rng(key))
        assert np.array_equal(batch.images[0, c], augment(resize_lanczos(decode_jpeg(jpeg)), drawn))


def test_crops_lie_anywhere_when_told(loader) -> None:
    drawn = {
        offsets: next(iter(loader(image_aug=True, on_device=True, crop_offsets=offsets, batch_size=16)))
        for offsets in ("diagonal", "independent")
    }
    diagonal, independent = (drawn[k].augmentation[:, 0] for k in ("diagonal", "independent"))
    assert np.array_equal(diagonal[:, 0], diagonal[:, 1]) and (independent[:, 0] != independent[:, 1]).all()
    assert np.array_equal(np.delete(diagonal, 1, 1), np.delete(independent, 1, 1))  # all else is the same draw


def test_for_the_device_the_pictures_stay_as_they_are_and_the_drawn_numbers_go_along(loader) -> None:
    here, there = (next(iter(loader(image_aug=True, on_device=on, workers=2))) for on in (False, True))
    plain = next(iter(loader()))
    assert np.array_equal(there.images, plain.images) and np.array_equal(there.input_ids, here.input_ids)
    for row in range(4):
        names = [f.name for f in fields(Augmentation)]
        drawn = Augmentation(**dict(zip(names, there.augmentation[row, 0].tolist(), strict=True)))
        assert np.array_equal(augment(there.images[row, 0], drawn), here.images[row, 0])


def test_a_data_set_without_wrist_and_states_trains_what_does_not_look(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bare = [replace(episode(i), wrist_images=[], states=np.zeros((0, 8), np.float32)) for i in range(2)]
    store = store_of(tmp_path, bare)
    flags: dict = {"batch_size": 2, "seed": 0, "image_aug": False, "val_split_from_train": False}
    assert next(iter(Loader([store], tokenizer, **flags))).images.shape == (2, 1, 224, 224, 3)
    with pytest.raises(DatasetError, match="no pictures of robot0_eye_in_hand and no proprio"):
        Loader([store], tokenizer, needs=FOUR, **flags)
    still = store_of(tmp_path / "still", [replace(episode(i), states=np.zeros((4, 8), np.float32)) for i in range(2)])
    with pytest.raises(UserError, match="statistics of libero_object_no_noops without proprio"):
        Loader([still], tokenizer, needs=FOUR, **flags)


def test_chunks_proprio_pictures_and_ids_equal_the_originals(golden: Path, tmp_path: Path) -> None:
    name, z = "libero_spatial_no_noops", np.load(golden / "oft/rlds.npz")
    copy_dataset(golden / "oft/rlds" / name, tmp_path / name)
    store = index_here(tmp_path, name)
    theirs = json.loads((golden / "oft/pt/dataset_statistics.json").read_text())
    assert store.statistics == theirs
    needs = Needs(cameras=("agentview", "robot0_eye_in_hand"), proprio=True, chunk=8, execute=8)
    flags: dict = {"batch_size": 22, "seed": 0, "image_aug": False, "val_split_from_train": False}
    loader = Loader([store], load_tokenizer(golden / "model"), needs=needs, **flags)
    assert len(loader) == 1 + 2 + 14 + 5
    batch = next(iter(loader))
    row_of = {int(n): row for row, n in enumerate(batch.samples)}
    assert [length - 7 for length in store.episode_lengths] == [len(z[f"t{t}_chunks"]) for t in trajectories(store, z)]
    for first, t in zip(np.cumsum([0, *store.episode_lengths]), trajectories(store, z), strict=False):
        rows = [row_of[first + k] for k in range(len(z[f"t{t}_chunks"]))]
        assert np.array_equal(batch.actions[rows], z[f"t{t}_chunks"])
        assert np.array_equal(batch.proprio[rows], z[f"t{t}_proprio"][:, 0])
        for c, camera in enumerate(("primary", "wrist")):
            digests = [hashlib.sha256(batch.images[row, c].tobytes()).hexdigest() for row in rows]
            assert digests == z[f"t{t}_{camera}_sha256"].tolist()
        for f in (0, len(rows) - 1):
            ids, labels = z[f"t{t}_f{f}_input_ids"], z[f"t{t}_f{f}_labels"]
            length = batch.lengths[rows[f]]
            assert np.array_equal(batch.input_ids[rows[f], :length], ids)
            assert np.array_equal(np.flatnonzero(labels != -100), np.arange(length)[-57:])


def trajectories(store: FrameStore, z: Mapping[str, np.ndarray]) -> list[int]:
    """The reference's number of each of the store's episodes, told by its length."""
    return [z["lengths"].tolist().index(length) for length in store.episode_lengths]


# --- augmentation, validation ---


def test_augmentation_is_drawn_for_each_frame_and_epoch(loader, store: FrameStore) -> None:
    stream = islice(loader(image_aug=True, batch_size=1), 2 * 76)
    images = {}
    for k, batch in enumerate(stream):
        images[k // 76, int(batch.samples[0])] = batch.images[0, 0]
    plain = resize_lanczos(decode_jpeg(store[5].image))
    drawn = draw_augmentation(np.random.default_rng((7, 0, 1, 5)))  # seed, data set, epoch, frame
    assert np.array_equal(images[1, 5], augment(plain, drawn))
    assert not np.array_equal(images[0, 5], images[1, 5])


def test_validation_shows_the_middle_when_training_augments(loader, store: FrameStore) -> None:
    batch = next(iter(loader(split="val", image_aug=True)))
    plain = resize_lanczos(decode_jpeg(store[int(batch.samples[0])].image))
    assert np.array_equal(batch.images[0, 0], crop_center(plain))


def test_tokens_and_labels_equal_the_originals(golden: Path, tmp_path: Path) -> None:
    name = "libero_spatial_no_noops"
    copy_dataset(golden / "rlds" / name, tmp_path / name)
    store, z = index_here(tmp_path, name), np.load(golden / "rlds/golden.npz")
    batch = next(iter(Loader([store], load_tokenizer(golden / "model"), batch_size=83, seed=0, image_aug=False)))
    row_of = {int(n): row for row, n in enumerate(batch.samples)}
    for i in range(6):
        trajectory = int(z[f"e2e{i}_traj"])
        row = row_of[sum(store.episode_lengths[:trajectory])]  # its first frame
        length = batch.lengths[row]
        assert np.array_equal(batch.input_ids[row, :length], z[f"e2e{i}_input_ids"])
        assert np.array_equal(np.flatnonzero(z[f"e2e{i}_labels"] != -100), np.arange(length)[-8:])


def test_a_torn_jpeg_in_the_store_names_the_frame(loader, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FrameStore.jpeg
    monkeypatch.setattr(FrameStore, "jpeg", lambda store, i, camera: whole(store, i, camera)[:500])
    with pytest.raises(DatasetError, match=r"frame \d+ of .*index: bytes that are no JPEG"):
        next(iter(loader(workers=1)))


def test_the_instructions_reach_the_prompt(loader, tokenizer: Tokenizer) -> None:
    batch = next(iter(loader(batch_size=16)))
    texts = {tokenizer.decode([int(i) for i in ids if i < 31744]) for ids in batch.input_ids}
    assert all(any(s in t for s in SENTENCES) for t in texts)
