"""Frames -> batches. Which sample comes when is `stream.py`'s matter; here it becomes pictures, ids and actions.

Legend: B batch, C cameras, K actions a sample (chunk), T text tokens.

Threads, not processes: decoding, arithmetic and copies release the GIL, and a batch need not be copied. A batch's rows
are written in parts, straight to where they stay: on a GPU machine to pinned memory, which torch hands out again when
the copy to the device is done.

Augmentation is drawn for each picture from (seed, data set, epoch, frame), wherever it is then carried out: here, in
the original's own arithmetic, or on the device (`augmentation.py`), for which the batch carries what was drawn.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from spvla.config import CropOffsets
from spvla.data.frames import Frames, StoredFrames
from spvla.data.store import FrameStore
from spvla.data.stream import Places, Stream, order
from spvla.errors import DatasetError
from spvla.policies.openvla import actions
from spvla.policies.openvla.images import Augmentation, augment, crop_center, draw_augmentation
from spvla.policies.openvla.prompt import EOS, PAD, prompt_ids
from spvla.types import ACTION_DIM, IMAGE_SIZE, PROPRIO_DIM, Batch, Needs

Split = Literal["train", "val"]
PART = 8  # samples, at least, that a thread prepares at a time


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A batch whose pictures are being prepared."""

    samples: np.ndarray  # (B,) numbers in the stream
    places: Places
    numbers: np.ndarray  # (B,) frame in its store
    images: np.ndarray  # (B, C, 224, 224, 3) uint8
    augmentation: np.ndarray | None  # (B, C, 6) float32


class Loader:
    """Iterates over Batches: for ever over "train", once over "val" (each sample once, in a fixed shuffled order).

    Frames of "train" are augmented if `image_aug`; those of "val" are then center-cropped, as evaluation crops for
    policies trained so. `workers` threads prepare up to `prefetch` batches ahead; 0 prepares them in the caller's.
    """

    def __init__(
        self,
        stores: Sequence[FrameStore],
        tokenizer: Tokenizer,
        *,
        needs: Needs = Needs(),  # noqa: B008 (frozen)
        weights: Sequence[float] | None = None,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        image_aug: bool,
        crop_offsets: CropOffsets = "diagonal",
        on_device: bool = False,
        frames: Sequence[Frames] | None = None,
        split: Split = "train",
        val_split_from_train: bool = True,
        start_sample: int = 0,
        workers: int = 2,
        prefetch: int = 4,
        pinned: bool = False,
    ) -> None:
        """`needs` says which cameras, whether proprio, and how many actions. `weights` are the data sets' shares of
        samples, equal by default. `frames` are where each store's pictures come from, by default its JPEGs. With
        `on_device` batches hold training pictures as they are, and what was drawn for `augment_on_device`.

        Raises DatasetError where a split is empty or a data set lacks what is needed, UserError for an instruction that
        makes no prompt.
        """
        self.stores, self.needs = list(stores), needs
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.augments, self.crops = image_aug and split == "train", image_aug and split == "val"
        self.diagonal, self.on_device = crop_offsets == "diagonal", on_device
        self.split, self.workers, self.prefetch, self.pinned = split, workers, prefetch, pinned
        self.start_sample = start_sample
        self.frames = list(frames or map(StoredFrames, self.stores))
        self.current = [
            s.current_frames(split, chunk=needs.chunk, val_split_from_train=val_split_from_train) for s in self.stores
        ]
        for store, current in zip(self.stores, self.current, strict=True):
            require_needs(store, needs)
            require_frames(store, current, split, chunk=needs.chunk)
        self.offsets = np.cumsum([0, *(len(s) for s in self.stores)])
        sizes = tuple(len(c) for c in self.current)
        self.stream = Stream(sizes, tuple(weights or [1.0] * len(sizes)), seed)
        self.prompts = _Prompts(self.stores, tokenizer)

    def __len__(self) -> int:
        """Samples in the split: for one data set, an epoch."""
        return sum(self.stream.sizes)

    def __iter__(self) -> Iterator[Batch]:
        if not self.workers:
            for samples in self._steps():
                draft = self._draft(samples)
                self._fill(draft, slice(0, len(samples)))
                yield self._batch(draft)
            return
        with ThreadPoolExecutor(self.workers, thread_name_prefix="loader") as pool:
            ahead: deque[tuple[list[Future[None]], Future[Batch]]] = deque()
            try:
                for samples in self._steps():
                    ahead.append(self._submit(pool, samples))
                    if len(ahead) > self.prefetch:
                        yield _take(ahead)
                while ahead:
                    yield _take(ahead)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, samples: np.ndarray) -> tuple[list[Future[None]], Future[Batch]]:
        draft = self._draft(samples)
        size = max(PART, -(-len(samples) // self.workers))
        parts = [pool.submit(self._fill, draft, slice(i, i + size)) for i in range(0, len(samples), size)]
        return parts, pool.submit(self._batch, draft)

    def _steps(self) -> Iterator[np.ndarray]:
        """This rank's sample numbers, step by step."""
        first = self.start_sample + self.rank * self.batch_size
        end = None if self.split == "train" else len(self)
        while end is None or first < end:
            last = first + self.batch_size if end is None else min(end, first + self.batch_size)
            yield np.arange(first, last, dtype=np.int64)
            first += self.batch_size * self.world_size

    def _places(self, samples: np.ndarray) -> Places:
        if self.split == "train":
            return self.stream.places(samples)
        k = order(len(self), self.seed)[samples].astype(np.int64)
        ends = np.cumsum(self.stream.sizes)
        dataset = np.searchsorted(ends, k, side="right")
        return Places(dataset=dataset, epoch=np.zeros_like(k), position=k - (ends - self.stream.sizes)[dataset])

    def _draft(self, samples: np.ndarray) -> _Draft:
        places = self._places(samples)
        numbers = np.empty_like(samples)
        for d, current in enumerate(self.current):
            here = places.dataset == d
            numbers[here] = current[places.position[here]]
        shape = (len(samples), len(self.needs.cameras))
        return _Draft(
            samples=samples,
            places=places,
            numbers=numbers,
            images=new_images((*shape, IMAGE_SIZE, IMAGE_SIZE, 3), pinned=self.pinned),
            augmentation=np.empty((*shape, 6), np.float32) if self.augments and self.on_device else None,
        )

    def _fill(self, draft: _Draft, rows: slice) -> None:
        """Writes the pictures of some samples, and what was drawn for them."""
        for row in range(*rows.indices(len(draft.samples))):
            dataset, number = int(draft.places.dataset[row]), int(draft.numbers[row])
            for c, camera in enumerate(self.needs.cameras):
                image = draft.images[row, c]
                self.frames[dataset].read(number, camera, image)
                if draft.augmentation is not None:
                    draft.augmentation[row, c] = self._drawn(draft.places, row, number, c).row()
                elif self.augments:
                    image[...] = augment(image, self._drawn(draft.places, row, number, c))
                elif self.crops:
                    image[...] = crop_center(image)

    def _drawn(self, places: Places, row: int, number: int, camera: int) -> Augmentation:
        key = (self.seed, int(places.dataset[row]), int(places.epoch[row]), number)
        rng = np.random.default_rng((*key, camera) if camera else key)
        return draw_augmentation(rng, diagonal=self.diagonal)

    def _batch(self, draft: _Draft) -> Batch:
        """All but the pictures, which may still be under way."""
        dataset, numbers, size = draft.places.dataset, draft.numbers, len(draft.samples)
        chunks = np.empty((size, self.needs.chunk, ACTION_DIM), np.float32)
        proprio = np.empty((size, PROPRIO_DIM), np.float32) if self.needs.proprio else None
        prompts = np.empty(size, np.int64)
        for d, store in enumerate(self.stores):
            here = dataset == d
            own = numbers[here]
            chunks[here] = store.action_stats.normalise(store.actions[own[:, None] + np.arange(self.needs.chunk)])
            prompts[here] = self.prompts.rows[d][store.episodes[own]]
            if proprio is not None and store.proprio is not None:
                proprio[here] = store.proprio_stats.for_training(store.proprio[own])
        input_ids, lengths = self.prompts.with_answers(prompts, actions.encode(chunks))
        return Batch(
            images=draft.images,
            augmentation=draft.augmentation,
            proprio=proprio,
            input_ids=input_ids,
            lengths=lengths,
            actions=chunks,
            samples=self.offsets[dataset] + numbers,
        )


class _Prompts:
    """Each instruction's ids, made once."""

    def __init__(self, stores: Sequence[FrameStore], tokenizer: Tokenizer) -> None:
        instructions = sorted({instruction for s in stores for instruction in s.instructions})
        row = {instruction: i for i, instruction in enumerate(instructions)}
        self.rows = [np.array([row[i] for i in s.instructions], np.int64) for s in stores]  # of each episode
        prompts = [prompt_ids(tokenizer, instruction) for instruction in instructions]
        self.lengths = np.array([len(p) for p in prompts])
        self.ids = np.full((len(prompts), self.lengths.max()), PAD, np.int64)
        for i, p in enumerate(prompts):
            self.ids[i, : len(p)] = p

    def with_answers(self, rows: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Prompts (B,) and action ids (B, K, 7) -> ids (B, T) with EOS, padded on the right; lengths (B,)."""
        answers = np.pad(answers.reshape(len(rows), -1), ((0, 0), (0, 1)), constant_values=EOS)
        starts = self.lengths[rows]
        lengths = starts + answers.shape[1]
        ids = np.full((len(rows), lengths.max()), PAD, np.int64)
        ids[:, : starts.max()] = self.ids[rows, : starts.max()]
        np.put_along_axis(ids, starts[:, None] + np.arange(answers.shape[1]), answers, 1)
        return ids, lengths


def new_images(shape: tuple[int, ...], *, pinned: bool) -> np.ndarray:
    """Uninitialised uint8. Pinned memory comes from torch's pool, which takes it back when nobody holds it any more and
    no copy out of it is under way."""
    if not pinned:
        return np.empty(shape, np.uint8)
    import torch  # here: collecting and indexing need none

    return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()


def _take(ahead: deque[tuple[list[Future[None]], Future[Batch]]]) -> Batch:
    parts, batch = ahead.popleft()
    for part in parts:
        part.result()
    return batch.result()


def require_needs(store: FrameStore, needs: Needs) -> None:
    """Raises UserError where the data set lacks a camera or proprio that the policy wants."""
    lacks = [f"pictures of {camera}" for camera in needs.cameras if camera not in store.cameras]
    lacks += ["proprio"] if needs.proprio and store.proprio is None else []
    if lacks:
        raise DatasetError(
            f"the data set {store.name} has no {' and no '.join(lacks)}",
            expected="what the policy looks at",
            remedy="Use a data set with wrist_image and state, or a policy that does without.",
        )
    if needs.proprio:
        _ = store.proprio_stats  # refused here rather than by a thread, where they are all zeros


def require_frames(store: FrameStore, frames: Sequence[int] | np.ndarray, split: Split, *, chunk: int = 1) -> None:
    """Raises DatasetError where a split holds no sample."""
    if len(frames) == 0:
        raise DatasetError(
            f"the {split} split of {store.name} is empty ({len(store.episode_lengths)} episodes in all)",
            expected="at least one episode"
            + (f" of {chunk} steps" if chunk > 1 else "")
            + (" held out: 5% of at least 11" if split == "val" else ""),
            remedy="Use more demonstrations"
            + (", or do without validation (--val_steps 0)." if split == "val" else "."),
        )
