"""k-means over vectors that no memory holds at once: blocks of them, dealt to processes in turn.

Everything drawn at random is a function of the seed and of a vector's place in the whole, and all sums are taken in
float64: any number of processes that share the same blocks come to the same centroids but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

CHUNK = 4_096
"""Distances are computed for this many vectors at a time: 4,096 × 1,024 centroids are 16 MiB, which caches like."""
SAMPLE_VECTORS = 65_536
"""Of more vectors than this, a sample of so many is converged on first: full passes are dear."""
LEAST_SAMPLED = 4
"""The sample has at least so many vectors for each centroid."""
START_VECTORS = 16
"""k-means++ looks at this many vectors of the sample for each centroid it draws."""
SAMPLE_PASSES = 20
TOLERANCE = 1e-4
"""Passes end when one lowers the error by less than this share."""

Start = Literal["kmeans++", "sample"]


class Blocks(Protocol):
    """Vectors float32 in blocks `[n, dim]`: a list of tensors, or what reads them from a disk when they are asked for.

    Block i of process r, of n processes, is block i × n + r of the whole.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...

    def __setitem__(self, index: int, block: Tensor, /) -> None: ...


class Group(Protocol):
    """The processes that fit together, and this one's place among them."""

    rank: int
    world_size: int

    def sum_(self, values: Tensor) -> Tensor:
        """Adds up `values` of all processes in place."""
        ...


class Alone:
    """A group of one."""

    rank, world_size = 0, 1

    def sum_(self, values: Tensor) -> Tensor:
        return values


class Draw:
    """Vectors drawn at random from all blocks, by weight and none twice, in one pass and with bounded memory.

    Each vector runs a race of exponential time with its weight as the rate; the first to arrive are a weighted sample
    without replacement (Efraimidis and Spirakis 2006). A vector of weight zero never arrives.
    """

    def __init__(self, count: int, seed: tuple[int, ...], group: Group) -> None:
        self.count, self.seed, self.group = count, seed, group
        self._times = torch.empty(0, dtype=torch.float64)
        self._places = torch.empty(0, 2, dtype=torch.int64)
        self._latest = float("inf")

    def offer(self, index: int, weights: Tensor) -> None:
        """Lets the vectors of this process's block `index` take part, with `weights` `[n]`."""
        number = index * self.group.world_size + self.group.rank
        times = torch.from_numpy(np.random.default_rng((*self.seed, number)).exponential(size=len(weights))) / weights
        rows = (times < self._latest).nonzero()[:, 0]
        self._times = torch.cat([self._times, times[rows]])
        self._places = torch.cat([self._places, torch.stack([torch.full_like(rows, index), rows], 1)])
        if len(self._times) > 2 * self.count:
            self._keep_first()

    def vectors(self, blocks: Blocks, dim: int, count: int) -> Tensor:
        """The first `count`, or as many as took part, of the vectors of all processes: `[n, dim]`, the same on all."""
        self._keep_first()
        group = self.group
        table = torch.zeros(group.world_size, self.count, dtype=torch.float64)
        table[group.rank] = float("inf")
        table[group.rank, : len(self._times)] = self._times
        times = group.sum_(table).flatten()
        first = times.argsort(stable=True)[: min(count, int(times.isfinite().sum()))]
        found = torch.zeros(len(first), dim)
        own = (first // self.count == group.rank).nonzero()[:, 0]
        places = self._places[first[own] % self.count]
        by_block = places[:, 0].argsort(stable=True)
        indices, sizes = places[by_block, 0].unique_consecutive(return_counts=True)
        for index, part in zip(indices.tolist(), by_block.split(sizes.tolist()), strict=True):
            found[own[part]] = blocks[index][places[part, 1]]
        return group.sum_(found)

    def _keep_first(self) -> None:
        if len(self._times) > self.count:
            self._times, kept = self._times.topk(self.count, largest=False)
            self._places = self._places[kept]
            self._latest = float(self._times.max())


def survey(blocks: Blocks, dim: int, count: int, seed: tuple[int, ...], group: Group) -> tuple[int, float, Draw]:
    """How many vectors all processes have, their variance summed over dimensions, and an even draw of `count`.

    Raises ValueError where there are no vectors.
    """
    number, squares = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    sums = torch.zeros(dim, dtype=torch.float64)
    draw = Draw(max(SAMPLE_VECTORS, LEAST_SAMPLED * count), seed, group)
    for index in range(len(blocks)):
        block = blocks[index]
        number += len(block)
        for part in block.split(CHUNK):
            sums += part.sum(0, dtype=torch.float64)
            squares += part.double().square().sum()
        draw.offer(index, torch.ones(len(block)))
    for total in (number, squares, sums):
        group.sum_(total)
    if not number:
        raise ValueError("k-means was given no vectors")
    variance = squares / number - (sums / number).square().sum()
    return int(number), float(variance.clamp_min(1e-12)), draw


def begin(sample: Tensor, count: int, start: Start, seed: tuple[int, ...], group: Group) -> Tensor:
    """`count` centroids to start from, out of a sample in random order, which the first process chooses for all.

    sample: the first of it. kmeans++: vectors far from each other.
    """
    chosen = torch.zeros(count, sample.shape[1])
    if group.rank == 0:
        indices = torch.arange(count) % len(sample)
        if start == "kmeans++":
            indices = _plus_plus(sample[: START_VECTORS * count], count, np.random.default_rng(seed))
        chosen[:] = sample[indices]
    return group.sum_(chosen)


def _plus_plus(x: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """Which `count` rows of `x` to start from: of a few drawn with the squared distance to those before, each time the
    one that leaves the least (the greedy variant of Arthur and Vassilvitskii 2007)."""
    x = x - x.mean(0)  # distances come by way of a product, which rounds less near the origin
    norms = x.square().sum(1)
    trials = 2 + int(math.log(count))
    indices = [0]
    distance = (x - x[0]).square().sum(1)
    while len(indices) < count:
        upto = distance.double().cumsum(0)
        points = torch.from_numpy(random.random(trials)) * upto[-1]
        drawn = torch.searchsorted(upto, points, right=True).clamp_max(len(x) - 1)
        distances = torch.addmm(norms, x[drawn], x.T, alpha=-2).add_(norms[drawn, None]).clamp_min_(0)
        distances = torch.minimum(distances, distance)
        best = int(distances.sum(1).argmin())
        indices.append(int(drawn[best]))
        distance = distances[best]
    return torch.tensor(indices)


def converge(
    blocks: Blocks,
    centroids: Tensor,
    passes: int,
    seed: tuple[int, ...],
    group: Group,
    report: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """The centroids after at most `passes` of Lloyd's algorithm. `report` is called with the share that is done."""
    before = float("inf")
    for number in range(passes):

        def within(share: float, number: int = number) -> None:
            report((number + share) / passes)

        centroids, error = _lloyd(blocks, centroids, (*seed, number), group, within)
        if error >= before * (1 - TOLERANCE):
            break
        before = error
    return centroids


def _lloyd(
    blocks: Blocks, centroids: Tensor, seed: tuple[int, ...], group: Group, report: Callable[[float], None]
) -> tuple[Tensor, float]:
    """One pass: the mean of the vectors nearest to each centroid, and the sum of squared distances before the move.

    A centroid that no vector chose is moved to a vector drawn by its squared distance, where any is left.
    """
    sums = torch.zeros(centroids.shape, dtype=torch.float64)
    counts, error = torch.zeros(len(centroids), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    draw = Draw(len(centroids), seed, group)
    for index in range(len(blocks)):
        block = blocks[index]
        codes, distance = nearest(block, centroids)
        for part, of_part in zip(block.split(CHUNK), codes.split(CHUNK), strict=True):
            sums.index_add_(0, of_part, part.double())
        counts += torch.bincount(codes, minlength=len(centroids))
        error += distance.sum(dtype=torch.float64)
        draw.offer(index, distance)
        report((index + 1) / len(blocks))
    for total in (sums, counts, error):
        group.sum_(total)
    alive = counts > 0
    moved = torch.where(alive[:, None], sums / counts.clamp_min(1)[:, None], centroids.double()).float()
    dead = (~alive).nonzero()[:, 0]
    if len(dead):
        drawn = draw.vectors(blocks, centroids.shape[1], len(dead))
        moved[dead[: len(drawn)]] = drawn
    return moved, float(error)


def residuals(blocks: Blocks, centroids: Tensor, keep: bool, group: Group) -> float:
    """The sum of squared distances of all vectors to their nearest centroids; with `keep` what is left of each vector
    takes its place."""
    error = torch.zeros(1, dtype=torch.float64)
    for index in range(len(blocks)):
        block = blocks[index]
        left = block - centroids[nearest(block, centroids)[0]]
        error += left.square().sum(dtype=torch.float64)
        if keep:
            blocks[index] = left
    return float(group.sum_(error))


def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `x` `[n, dim]` the nearest centroid and the squared distance to it, in chunks of fixed memory."""
    norms = centroids.square().sum(1)
    found = [torch.addmm(norms, part, centroids.T, alpha=-2).min(1) for part in x.split(CHUNK)]
    distance = torch.cat([part.values for part in found]) + x.square().sum(1)
    return torch.cat([part.indices for part in found]), distance.clamp_min_(0)
