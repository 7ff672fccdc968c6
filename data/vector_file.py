"""Vectors on a disk, of which only the block at work is in memory."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from model.errors import UserError


class VectorFile:
    """Blocks `[n, dim]` of vectors in an open file: appended one after another, then read and replaced in any order.

    It is read with plain reads: the pages of a mapping would count, and stay, as memory of the process. `dtype` is that
    in the file; blocks are float32. Of a file that holds vectors already, `sizes` are the lengths of its blocks.
    """

    def __init__(self, file: BinaryIO, dim: int, dtype: torch.dtype = torch.float32, sizes: Iterable[int] = ()) -> None:
        self.file, self.dim, self.dtype = file, dim, dtype
        self._ends = list(itertools.accumulate(sizes))

    def append(self, block: Tensor) -> None:
        """Adds a block after the last."""
        self._ends.append(self.vectors + len(block))
        self[len(self) - 1] = block

    @property
    def vectors(self) -> int:
        """How many it holds in all blocks."""
        return self._ends[-1] if self._ends else 0

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Tensor:
        rows = self._seek(index)
        stored = np.fromfile(self.file, torch.empty(0, dtype=self.dtype).numpy().dtype, rows * self.dim)
        return torch.from_numpy(stored).view(rows, self.dim).float()

    def __setitem__(self, index: int, block: Tensor) -> None:
        if block.shape != (self._seek(index), self.dim):
            raise ValueError(f"block {index} cannot be replaced by one of shape {list(block.shape)}")
        block.detach().to(self.dtype).numpy().tofile(self.file)

    def _seek(self, index: int) -> int:
        """Goes to where a block begins and returns how many vectors it has."""
        if not 0 <= index < len(self._ends):
            raise IndexError(index)
        first = self._ends[index - 1] if index else 0
        self.file.seek(first * self.dim * self.dtype.itemsize)
        return self._ends[index] - first


def check_room(folder: Path, vectors: int, dim: int, what: str, key: str) -> None:
    """Raises UserError unless the disk of `folder` has room for so many vectors in float32.

    `what` says what they are for, `key` is the key of the recipe that bounds them.
    """
    needed, free = 4 * vectors * dim, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{what} keeps {vectors:,} vectors of {dim} numbers, {needed / 1e9:.1f} GB, on the disk of "
            f"{os.fspath(folder)} while it lasts; {free / 1e9:.1f} GB are free. Make room, or lower {key}."
        )
