"""Residual k-means: vectors → a few small integers each, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import Self

from model.lloyd import (
    CHUNK,
    SAMPLE_PASSES,
    Alone,
    Blocks,
    Group,
    Start,
    begin,
    converge,
    nearest,
    residuals,
    survey,
)
from model.saving import save_tensors

ALONE = Alone()


class ResidualKMeans:
    """`levels` k-means in a row: each quantizes what the levels before it left over. One level is plain k-means.

    `centroids` is float32 `[levels, codebook_size, dim]`, zero until fitted.
    """

    def __init__(self, levels: int, codebook_size: int, dim: int) -> None:
        self.levels, self.codebook_size, self.dim = levels, codebook_size, dim
        self.centroids = torch.zeros(levels, codebook_size, dim)

    def fit(
        self,
        blocks: Blocks,
        *,
        iterations: int = 20,
        start: Start = "kmeans++",
        seed: int = 0,
        group: Group = ALONE,
        report: Callable[[float], None] = lambda share: None,
    ) -> list[float]:
        """Fits all levels to blocks of vectors `[n, dim]` and returns the share of the variance left after each.

        Memory does not grow with the vectors: blocks are asked for one at a time, and what a level leaves of a block
        takes its place in `blocks` for the next one. Each level starts from k-means++ or from a sample. Of more than
        65,536 vectors a sample is converged on first; then at most `iterations` Lloyd passes go over all of
        them. A centroid that no vector chose is moved to a vector drawn by its squared error.

        The processes of `group` fit together, each with its share of the blocks. The same blocks and seed give the
        same centroids, and other numbers of processes the same but for rounding. `report` is called with the share
        that is done. Raises ValueError where there are no vectors.
        """
        total, variance, draw = survey(blocks, self.dim, self.codebook_size, (seed,), group)
        left = []
        for level in range(self.levels):

            def of_level(share: float, level: int = level) -> None:
                report((level + share) / self.levels)

            sample = draw.vectors(blocks, self.dim, draw.count)
            centroids = begin(sample, self.codebook_size, start, (seed, level), group)
            if total > len(sample):
                dealt = list(sample.split(CHUNK))[group.rank :: group.world_size]
                centroids = converge(dealt, centroids, SAMPLE_PASSES, (seed, level, 0), group)
                del dealt
            del sample  # before the long part: it is most of the memory
            centroids = converge(blocks, centroids, iterations, (seed, level, 1), group, of_level)
            self.centroids[level] = centroids
            error = residuals(blocks, centroids, level + 1 < self.levels, group)
            left.append(error / total / variance)
            report((level + 1) / self.levels)
        return left

    def encode(self, x: Tensor) -> Tensor:
        """Codes int64 `[..., levels]` of `x` `[..., dim]`."""
        residual = x.reshape(-1, self.dim).float()
        codes = []
        for centroids in self.centroids:
            codes.append(nearest(residual, centroids)[0])
            residual = residual - centroids[codes[-1]]
        return torch.stack(codes, -1).view(*x.shape[:-1], self.levels)

    def decode(self, codes: Tensor) -> Tensor:
        """The summed centroids `[..., dim]` of `codes` `[..., levels]`; codes of fewer levels give a coarser sum."""
        return sum(self.centroids[level][codes[..., level].long()] for level in range(codes.shape[-1]))  # type: ignore

    def save(self, path: Path, name: str = "centroids") -> None:
        """Writes the centroids as the one tensor `name` of a safetensors file."""
        save_tensors({name: self.centroids}, path)

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
