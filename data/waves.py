"""Decoding beside the encoders: processes that read the next clips while those before are encoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.corpus import Clip, ClipError, load_clip
from data.processes import die_with_parent

AHEAD = 2
"""Batches that each process reads ahead."""
Kind = tuple[int, int]
"""Sample rate (Hz) and channels of what an encoder hears."""


@dataclass(frozen=True)
class Waves:
    """The audio of a batch of clips of one length, and why others of the batch could not be read."""

    index: int
    clips: tuple[Clip, ...]
    waves: dict[Kind, Tensor]
    """For each kind float32 `[clips, samples]`, or `[clips, channels, samples]` where there are several."""
    unread: tuple[tuple[Clip, str], ...] = ()


class Reader(Dataset):
    """Batches of clips by their number, read in every kind the encoders ask for."""

    def __init__(self, corpus: Path, batches: Sequence[tuple[Clip, ...]], kinds: Iterable[Kind]) -> None:
        self.corpus, self.batches, self.kinds = corpus, batches, sorted(set(kinds))

    def __getitem__(self, index: int) -> Waves:
        clips, rows, unread = [], [], []
        for clip in self.batches[index]:
            try:
                rows.append([load_clip(self.corpus, clip, *kind) for kind in self.kinds])
                clips.append(clip)
            except ClipError as error:
                unread.append((clip, str(error)))
        waves = {
            kind: torch.from_numpy(np.stack([row[number] for row in rows])) for number, kind in enumerate(self.kinds)
        } if rows else {}  # fmt: skip
        return Waves(index, tuple(clips), waves, tuple(unread))


def read_ahead(reader: Reader, order: Iterable[int], workers: int) -> Iterator[Waves]:
    """The batches of `reader` in `order`, which is asked for its next number just before that is read.

    `workers` processes read; with none, this one does when a batch is taken.
    """
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        # Forked: the encoders are loaded already, and a worker does nothing with them.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=partial(_start_worker, os.getpid()),
        generator=torch.Generator(),
    )
    return iter(loader)


def _start_worker(parent: int, worker: int) -> None:
    die_with_parent(parent)
