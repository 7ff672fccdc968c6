"""Long waves and large batches, a piece of bounded size at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BATCH_SECONDS = 80.0
"""Audio in a model at a time, over all rows, where one row alone is not longer."""


def in_chunks(function: Callable[[int, int], Tensor], frames: int, size: int, left: int, right: int = 0) -> Tensor:
    """`function(first, last)`, which gives frames `[first, last)` on dimension 1, for all `frames`, `size` at a time.

    Every chunk is worked out with up to `left` frames of context before and `right` after it, which are then left out.
    Up to `size` frames, nothing is cut.
    """
    parts = []
    for start in range(0, max(frames, 1), size):
        stop = min(start + size, frames)
        first = max(0, start - left)
        part = function(first, min(frames, stop + right))
        parts.append(part[:, start - first : stop - first])
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def by_rows(function: Callable[[Tensor], Tensor], batch: Tensor, seconds: float) -> Tensor:
    """`function` of a few rows of `batch` at a time, each `seconds` long in memory."""
    rows = max(1, int(BATCH_SECONDS / max(seconds, 1e-3)))
    return function(batch) if len(batch) <= rows else torch.cat([function(part) for part in batch.split(rows)])
