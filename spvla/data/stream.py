"""Which sample comes when: a pure function of (seed, sample number), so any run can be resumed.

All ranks share one endless stream of samples s = 0, 1, 2, ...; step t gives rank r of W the B samples from
(t W + r) B on. For one data set of N samples, s is position s % N of the permutation drawn for epoch s // N: every one
once an epoch, whatever W and B are. The stream does not stop at an epoch's end: where B W does not divide N, the last
step of an epoch is filled up with the next one's first samples, and none is dropped. A run that stopped after s samples
goes on at s, with as many workers as it likes.

Several data sets share the stream in blocks of 10,000 samples, shuffled, of which each gets its weight's share; each
walks through its own epochs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLOCK = 10_000  # samples in which several data sets have exactly their shares


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where B samples lie; each (B,) int64."""

    dataset: np.ndarray
    epoch: np.ndarray
    position: np.ndarray  # in that data set's samples of the split


@dataclass(frozen=True)
class Stream:
    """Sample numbers -> Places. `sizes` are the data sets' samples, `weights` their shares of the stream."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def places(self, samples: np.ndarray) -> Places:
        """`samples` is (B,) int64."""
        dataset, drawn = self._draw(samples)
        size = np.array(self.sizes)[dataset]
        epoch, k = drawn // size, drawn % size
        position = np.empty_like(samples)
        for d, e in sorted(set(zip(dataset.tolist(), epoch.tolist(), strict=True))):
            chosen = (dataset == d) & (epoch == e)
            position[chosen] = order(self.sizes[d], self.seed, d, e)[k[chosen]]
        return Places(dataset=dataset, epoch=epoch, position=position)

    def _draw(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The data set of each sample, and how many samples that one gave before."""
        dataset, drawn = np.zeros_like(samples), samples.copy()
        if len(self.sizes) == 1:
            return dataset, drawn
        block, k = samples // BLOCK, samples % BLOCK
        share = np.array(shares(self.weights))
        for b in np.unique(block).tolist():
            labels, ranks = _block(self.weights, self.seed, b)
            inside = block == b
            dataset[inside] = labels[k[inside]]
            drawn[inside] = b * share[dataset[inside]] + ranks[k[inside]]
        return dataset, drawn


@lru_cache(maxsize=16)
def order(size: int, *seed: int) -> np.ndarray:
    """A permutation of `size` numbers."""
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
