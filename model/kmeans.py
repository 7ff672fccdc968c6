"""Residual k-means: vectors → a few small integers each, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import Self

# Distances are computed for this many vectors at a time: 16,384 × 1,024 centroids are 64 MiB.
CHUNK = 16_384
# k-means++ looks at this many vectors for each centroid it draws.
START_VECTORS = 16
# A level is finished when a pass lowers its error by less than this share.
TOLERANCE = 1e-4


class ResidualKMeans:
    """`levels` k-means in a row: each quantizes what the levels before it left over. One level is plain k-means.

    `centroids` is float32 `[levels, codebook_size, dim]`, zero until fitted.
    """

    def __init__(self, levels: int, codebook_size: int, dim: int) -> None:
        self.levels, self.codebook_size, self.dim = levels, codebook_size, dim
        self.centroids = torch.zeros(levels, codebook_size, dim)

    def fit(
        self,
        batches: Iterable[Tensor],
        *,
        iterations: int = 20,
        max_vectors: int = 50_000,
        seed: int = 0,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[float]:
        """Fits all levels to a stream of `[n, dim]` batches and returns the share of the variance left after each.

        The stream is read once and only a uniform sample of at most `max_vectors` is held, so memory does not grow with
        the data. Each level starts from k-means++ (Arthur and Vassilvitskii 2007) and runs at most `iterations` Lloyd
        passes; a centroid that no vector chose is moved to a vector drawn by its squared error. The same stream and
        seed give the same centroids. `report(done, total)` is called after each pass. Raises ValueError for an empty
        stream.
        """
        generator = torch.Generator().manual_seed(seed)
        residual = _sample(batches, max_vectors, generator)
        variance = float((residual - residual.mean(0)).square().sum(1).mean().clamp_min(1e-12))
        left = []
        for level in range(self.levels):
            centroids = _start(residual, self.codebook_size, generator)
            before = float("inf")
            for done in range(iterations):
                centroids, error = _lloyd(residual, centroids, generator)
                report(level * iterations + done + 1, self.levels * iterations)
                if error >= before * (1 - TOLERANCE):
                    break
                before = error
            self.centroids[level] = centroids
            residual -= centroids[_nearest(residual, centroids)[0]]
            left.append(float(residual.square().sum(1).mean()) / variance)
        return left

    def encode(self, x: Tensor) -> Tensor:
        """Codes int64 `[..., levels]` of `x` `[..., dim]`."""
        residual = x.reshape(-1, self.dim).float()
        codes = []
        for centroids in self.centroids:
            codes.append(_nearest(residual, centroids)[0])
            residual = residual - centroids[codes[-1]]
        return torch.stack(codes, -1).view(*x.shape[:-1], self.levels)

    def decode(self, codes: Tensor) -> Tensor:
        """The summed centroids `[..., dim]` of `codes` `[..., levels]`; codes of fewer levels give a coarser sum."""
        return sum(self.centroids[level][codes[..., level].long()] for level in range(codes.shape[-1]))  # type: ignore

    def save(self, path: Path, name: str = "centroids") -> None:
        """Writes the centroids as the one tensor `name` of a safetensors file."""
        save_file({name: self.centroids.contiguous()}, path)

    @classmethod
    def load(cls, path: Path, name: str = "centroids") -> Self:
        """Reads the tensor `name` of a safetensors file."""
        return cls.from_centroids(load_file(path)[name])

    @classmethod
    def from_centroids(cls, centroids: Tensor) -> Self:
        """A fitted quantizer from its centroids `[levels, codebook_size, dim]`."""
        quantizer = cls(*centroids.shape)
        quantizer.centroids = centroids.float()
        return quantizer


def _sample(batches: Iterable[Tensor], limit: int, generator: torch.Generator) -> Tensor:
    """A uniform sample of at most `limit` vectors: each gets a random key and the smallest keys stay."""
    kept: list[Tensor] = []
    keys: list[Tensor] = []
    held = 0
    for batch in batches:
        kept.append(batch.detach().float())
        keys.append(torch.rand(len(batch), generator=generator))
        held += len(batch)
        if held > 2 * limit:
            kept, keys = _smallest(kept, keys, limit)
            held = limit
    if not held:
        raise ValueError("k-means was given no vectors")
    return _smallest(kept, keys, min(limit, held))[0][0]


def _smallest(kept: list[Tensor], keys: list[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    vectors, key = torch.cat(kept), torch.cat(keys)
    index = key.topk(count, largest=False).indices.sort().values
    return [vectors[index]], [key[index]]


def _start(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++ on a random part of `x`: each next centroid is drawn with the squared distance to those before it."""
    part = x[torch.randperm(len(x), generator=generator)[: START_VECTORS * count]]
    chosen = torch.empty(count, x.shape[1])
    chosen[0] = part[0]
    distance = (part - chosen[0]).square().sum(1)
    for index in range(1, count):
        chosen[index] = part[_draw(distance, 1, generator)[0]]
        distance = torch.minimum(distance, (part - chosen[index]).square().sum(1))
    return chosen


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices drawn with `weights`; evenly where all are zero (fewer distinct vectors than centroids)."""
    total = weights.double().cumsum(0)
    if total[-1] <= 0:
        return torch.randint(len(weights), (count,), generator=generator)
    points = torch.rand(count, generator=generator, dtype=torch.float64) * total[-1]
    return torch.searchsorted(total, points, right=True).clamp_max(len(weights) - 1)


def _nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `x` `[n, dim]` the nearest centroid and the squared distance to it, in chunks of fixed memory."""
    norms = centroids.square().sum(1)
    found = [torch.addmm(norms, part, centroids.T, alpha=-2).min(1) for part in x.split(CHUNK)]
    distance = torch.cat([part.values for part in found]) + x.square().sum(1)
    return torch.cat([part.indices for part in found]), distance.clamp_min_(0)


def _lloyd(x: Tensor, centroids: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """One pass: the mean of the vectors nearest to each centroid, and the mean squared distance before the move."""
    index, distance = _nearest(x, centroids)
    counts = torch.bincount(index, minlength=len(centroids))
    sums = torch.zeros_like(centroids).index_add_(0, index, x)
    moved = sums / counts.clamp_min(1)[:, None]
    dead = (counts == 0).nonzero()[:, 0]
    if len(dead):
        moved[dead] = x[_draw(distance, len(dead), generator)]
    return moved, float(distance.mean())
