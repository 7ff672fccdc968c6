"""Which records each epoch has and in which order: drawn by (seed, epoch) alone, whatever ranks and workers read them.

Records are numbers, counted through all corpora; an array of them is all that an epoch costs. Where a clip comes again
within an epoch, `records` is added to its number for each time before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


class Epochs(Protocol):
    """The epochs of a dataset."""

    def size(self, epoch: int) -> int:
        """Records of an epoch, over all ranks."""

    def draw(self, epoch: int) -> Numbers:
        """They themselves, in the order in which all ranks together read them."""


@dataclass(frozen=True)
class InOrder:
    """Every epoch the same (validation): `kept` of `count` records, evenly spread, the first of which come again until
    there are `taken`, so that all ranks get equally many."""

    count: int
    kept: int
    taken: int

    def size(self, epoch: int) -> int:
        return self.taken

    def draw(self, epoch: int) -> Numbers:
        return np.arange(self.taken, dtype=np.int64) % self.kept * self.count // self.kept


@dataclass(frozen=True)
class Pool:
    """The records of one corpus that may be drawn."""

    numbers: Numbers
    shards: Numbers
    """The shard that each of them lies in."""

    def __len__(self) -> int:
        return len(self.numbers)

    def shuffled(self, block: int, random: np.random.Generator) -> Numbers:
        """All of them: shards in a random order, and within about each `block` records that follow each other so any
        order. A reader therefore needs the shards of one block or two at a time."""
        _, shard, counts = np.unique(self.shards, return_inverse=True, return_counts=True)
        order = random.permutation(len(counts))
        starts = np.empty(len(counts), np.int64)
        starts[order] = np.cumsum(counts[order]) - counts[order]
        return self.numbers[np.argsort(starts[shard] // block + random.random(len(self)))]


@dataclass(frozen=True)
class Phase:
    """What is drawn in a part of the training."""

    pools: Sequence[Pool]
    weights: Sequence[float]
    """Each corpus's part of the windows, relative to the others'."""
    steps: int | None = None
    """Global batches that it lasts; to the end of the training where None."""

    @property
    def available(self) -> int:
        """Records of all corpora that have a weight."""
        return sum(len(pool) for pool, weight in zip(self.pools, self.weights, strict=True) if weight)

    def shares(self, windows: int) -> list[int]:
        """How many of `windows` each corpus gives: by weight, rounded so that the sum is exact."""
        exact = [windows * weight / sum(self.weights) for weight in self.weights]
        shares = [int(share) for share in exact]
        by_rest = sorted(range(len(exact)), key=lambda corpus: shares[corpus] - exact[corpus])
        for corpus in by_rest[: windows - sum(shares)]:
            shares[corpus] += 1
        return shares


@dataclass(frozen=True)
class Shuffled:
    """An epoch is whole global batches: as many as the records of its phase fill, and at least one. With a phase the
    epoch ends as well. Of each corpus come as many as its share is, others each epoch; a small one starts over."""

    phases: Sequence[Phase]
    records: int
    """Of all corpora, whatever their weight."""
    global_batch: int
    block: int
    """Records that are shuffled together."""
    seed: int

    def size(self, epoch: int) -> int:
        return self._place(epoch)[1]

    def draw(self, epoch: int) -> Numbers:
        phase, size = self._place(epoch)
        shares = phase.shares(size)
        corpora = np.repeat(np.arange(len(shares)), shares)
        if np.count_nonzero(shares) > 1:
            np.random.default_rng([self.seed, epoch]).shuffle(corpora)
        numbers = np.empty(size, np.int64)
        for corpus, (pool, share) in enumerate(zip(phase.pools, shares, strict=True)):
            if share:
                numbers[corpora == corpus] = self._take(pool, share, np.random.default_rng([self.seed, epoch, corpus]))
        return numbers

    def _take(self, pool: Pool, share: int, random: np.random.Generator) -> Numbers:
        passes = -(-share // len(pool))
        again = [pool.shuffled(self.block, random) + number * self.records for number in range(passes)]
        return np.concatenate(again)[:share]

    def _place(self, epoch: int) -> tuple[Phase, int]:
        """The phase that an epoch belongs to, and its records."""
        for phase in self.phases:
            batches = max(1, phase.available // self.global_batch)
            if phase.steps is None:
                break
            epochs = -(-phase.steps // batches)
            if epoch < epochs:
                batches = min(batches, phase.steps - epoch * batches)
                break
            epoch -= epochs
        return phase, batches * self.global_batch
