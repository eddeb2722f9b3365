"""Frames -> batches: which sample comes when is a pure function of (seed, sample number), so any run can be resumed.

All ranks share one endless stream of samples s = 0, 1, 2, ...; step t gives rank r of W the B samples from
(t W + r) B on. For one data set of N frames, s is position s % N of the permutation drawn for epoch s // N: every frame
once an epoch, whatever W and B are. The stream does not stop at an epoch's end: where B W does not divide N, the last
step of an epoch is filled up with the next one's first samples, and none is dropped. A run that stopped after s samples
goes on at s, with as many workers as it likes.

Several data sets share the stream in blocks of 10,000 samples, shuffled, of which each gets its weight's share; each
walks through its own epochs.

Threads, not processes: decoding and arithmetic release the GIL, and a batch need not be copied.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from spvla.data.store import FrameStore
from spvla.errors import DatasetError, UserError
from spvla.policies.openvla import actions
from spvla.policies.openvla.images import augment, crop_center, decode_jpeg, draw_augmentation, resize_lanczos
from spvla.policies.openvla.prompt import IGNORED, PAD, training_ids
from spvla.types import Batch

BLOCK = 10_000  # samples in which several data sets have exactly their shares
Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a sample lies."""

    dataset: int
    epoch: int
    position: int  # in that data set's frames of the split


@dataclass(frozen=True)
class Stream:
    """Sample number -> Place. `sizes` are the data sets' frames, `weights` their shares of the samples."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def place(self, sample: int) -> Place:
        dataset, drawn = self._draw(sample)
        epoch, k = divmod(drawn, self.sizes[dataset])
        return Place(
            dataset=dataset, epoch=epoch, position=int(_order(self.sizes[dataset], self.seed, dataset, epoch)[k])
        )

    def _draw(self, sample: int) -> tuple[int, int]:
        """The data set, and how many samples it gave before."""
        if len(self.sizes) == 1:
            return 0, sample
        block, k = divmod(sample, BLOCK)
        labels, ranks = _block(self.weights, self.seed, block)
        dataset = int(labels[k])
        return dataset, block * shares(self.weights)[dataset] + int(ranks[k])


@lru_cache(maxsize=16)
def _order(size: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(size, dtype=np.int32))


def shares(weights: Sequence[float]) -> list[int]:
    """Samples of each data set in a block: proportional, at least one, summing to BLOCK."""
    exact = np.asarray(weights) / np.sum(weights) * BLOCK
    counts = np.maximum(1, np.floor(exact)).astype(int)
    for i in np.argsort(counts - exact)[: BLOCK - counts.sum()]:  # the largest remainders
        counts[i] += 1
    counts[np.argmax(counts)] += BLOCK - counts.sum()
    return counts.tolist()


@lru_cache(maxsize=4)
def _block(weights: tuple[float, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Which data set each sample of a block comes from, and how many of the same came before it in the block."""
    labels = np.repeat(np.arange(len(weights)), shares(weights))
    np.random.default_rng((seed, block)).shuffle(labels)
    ranks = np.empty(BLOCK, np.int64)
    for dataset in range(len(weights)):
        mine = labels == dataset
        ranks[mine] = np.arange(mine.sum())
    return labels, ranks


@dataclass(frozen=True, kw_only=True)
class _Sample:
    image: np.ndarray  # (224, 224, 3) uint8
    input_ids: list[int]
    labels: list[int]
    action: np.ndarray  # (7,) float32, normalised
    number: int


class Loader:
    """Iterates over Batches: for ever over "train", once over "val" (each frame once, in a fixed shuffled order).

    Frames of "train" are augmented if `image_aug`; those of "val" are then center-cropped, as evaluation crops for
    policies trained so. `workers` threads prepare up to `prefetch` batches ahead; 0 prepares them in the caller's.
    """

    def __init__(
        self,
        stores: Sequence[FrameStore],
        tokenizer: Tokenizer,
        *,
        weights: Sequence[float] | None = None,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        image_aug: bool,
        split: Split = "train",
        val_split_from_train: bool = True,
        start_sample: int = 0,
        workers: int = 2,
        prefetch: int = 4,
    ) -> None:
        """`weights` are the data sets' shares of samples, equal by default. Raises DatasetError if a split is empty."""
        self.stores, self.tokenizer = list(stores), tokenizer
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.image_aug, self.split, self.workers, self.prefetch = image_aug, split, workers, prefetch
        self.sample = start_sample  # of the whole stream, all ranks together: the next one to be handed out
        self.frames = [s.split(split, val_split_from_train=val_split_from_train) for s in self.stores]
        self.offsets = np.cumsum([0, *(len(s) for s in self.stores)])
        for store, frames in zip(self.stores, self.frames, strict=True):
            require_frames(store, frames, split)
        sizes = tuple(len(f) for f in self.frames)
        self.stream = Stream(sizes, tuple(weights or [1.0] * len(sizes)), seed)

    def __len__(self) -> int:
        """Frames in the split: for one data set, an epoch."""
        return sum(len(f) for f in self.frames)

    @property
    def epoch(self) -> float:
        """Passes over the data handed out so far."""
        return self.sample / len(self)

    def state_dict(self) -> dict[str, object]:
        """Where the stream stands: the same on every rank, so that rank 0 may save it for all."""
        return {"sample": self.sample, "seed": self.seed, "digests": [s.digest for s in self.stores]}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Goes on with the very next sample. Raises DatasetError if the data or the seed are others."""
        now = self.state_dict()
        for key in ("seed", "digests"):
            if state[key] != now[key]:
                raise DatasetError(
                    f"a checkpoint whose data has {key} {state[key]}",
                    expected=f"{now[key]}",
                    remedy="Start a new run, or give the data set and seed that this one began with.",
                )
        self.sample = int(state["sample"])  # type: ignore[call-overload]

    def __iter__(self) -> Iterator[Batch]:
        if not self.workers:
            for numbers in self._steps():
                batch = collate([self._make(n) for n in numbers])
                self._advance()
                yield batch
            return
        with ThreadPoolExecutor(self.workers, thread_name_prefix="loader") as pool:
            ahead: deque[list[Future[_Sample]]] = deque()
            try:
                for numbers in self._steps():
                    ahead.append([pool.submit(self._make, n) for n in numbers])
                    if len(ahead) > self.prefetch:
                        yield self._take(ahead)
                while ahead:
                    yield self._take(ahead)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _take(self, ahead: deque[list[Future[_Sample]]]) -> Batch:
        batch = collate([f.result() for f in ahead.popleft()])
        self._advance()
        return batch

    def _advance(self) -> None:
        self.sample += self.batch_size * self.world_size

    def _steps(self) -> Iterator[range]:
        """This rank's sample numbers, step by step."""
        first = self.sample + self.rank * self.batch_size
        end = None if self.split == "train" else len(self)
        while end is None or first < end:
            yield range(first, first + self.batch_size if end is None else min(end, first + self.batch_size))
            first += self.batch_size * self.world_size

    def _place(self, sample: int) -> Place:
        if self.split == "train":
            return self.stream.place(sample)
        k = int(_order(len(self), self.seed)[sample])
        dataset = int(np.searchsorted(np.cumsum(self.stream.sizes), k, side="right"))
        return Place(dataset=dataset, epoch=0, position=k - sum(self.stream.sizes[:dataset]))

    def _make(self, sample: int) -> _Sample:
        place = self._place(sample)
        store, number = self.stores[place.dataset], self.frames[place.dataset][place.position]
        frame = store[number]
        normalised = store.action_stats.normalise(frame.action)
        input_ids, labels = training_ids(self.tokenizer, frame.instruction, actions.encode(normalised))
        try:
            image = resize_lanczos(decode_jpeg(frame.image))
        except UserError as e:
            raise DatasetError(
                f"frame {number} of {store.folder}: {e.got}", expected=e.expected, remedy="Run spvla index again."
            ) from e
        if self.image_aug and self.split == "train":
            rng = np.random.default_rng((self.seed, place.dataset, place.epoch, number))
            image = augment(image, draw_augmentation(rng))
        elif self.image_aug:
            image = crop_center(image)
        offset = int(self.offsets[place.dataset])
        return _Sample(image=image, input_ids=input_ids, labels=labels, action=normalised, number=offset + number)


def require_frames(store: FrameStore, frames: range, split: Split) -> None:
    if len(frames) == 0:
        raise DatasetError(
            f"the {split} split of {store.name} is empty ({len(store.episode_lengths)} episodes in all)",
            expected="at least one episode" + (" held out: 5% of at least 11" if split == "val" else ""),
            remedy="Use more demonstrations"
            + (", or do without validation (--val_steps 0)." if split == "val" else "."),
        )


def collate(samples: Sequence[_Sample]) -> Batch:
    """Pads on the right to the longest."""
    width = max(len(s.input_ids) for s in samples)
    input_ids = np.full((len(samples), width), PAD, np.int64)
    labels = np.full((len(samples), width), IGNORED, np.int64)
    mask = np.zeros((len(samples), width), bool)
    for row, s in enumerate(samples):
        input_ids[row, : len(s.input_ids)] = s.input_ids
        labels[row, : len(s.labels)] = s.labels
        mask[row, : len(s.input_ids)] = True
    return Batch(
        images=np.stack([s.image for s in samples]),
        input_ids=input_ids,
        attention_mask=mask,
        labels=labels,
        actions=np.stack([s.action for s in samples]),
        samples=np.array([s.number for s in samples]),
    )
