"""Windows of token records for training: every field cut at one moment, the same crop for the same seed and epoch."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.epochs import Epochs, InOrder
from data.mixture import Mixture
from data.processes import die_with_parent
from data.shards import Shards
from data.shared_names import world_size
from model.errors import UserError
from model.fields import CONDITIONING, TokenField, common_period

Window = dict[str, np.ndarray]

DRAW = "draw"
"""What a batch calls the numbers, int64 [batch], that everything else random about its windows is drawn by."""


@dataclass(frozen=True)
class Cut:
    """Cuts a window out of a record. Everything random in it is a pure function of (seed, epoch, key of the clip)."""

    fields: tuple[TokenField, ...]
    """Fields to cut, without the conditioning."""
    conditioning: bool
    seconds: float
    embedding_seconds: float
    """Audio that one row of the conditioning describes."""
    hop_seconds: float
    """Time between two of them."""
    text_probability: float
    seed: int
    fixed: bool
    """The same windows in every epoch (validation)."""
    short: bool = False
    """A record shorter than a window is a window of its own length, in whole steps of the grid."""

    @classmethod
    def of(
        cls,
        tokens: dict[str, Any],
        fields: list[str],
        seconds: float,
        text_probability: float,
        seed: int,
        *,
        fixed: bool,
        short: bool,
    ) -> Cut:
        """Of the `fields`, conditioning included where wanted, of a token artifact whose manifest says `tokens`."""
        return cls(
            tuple(TokenField.from_json(tokens["fields"][name]) for name in fields if name != CONDITIONING),
            CONDITIONING in fields,
            seconds,
            tokens["embedding_seconds"],
            tokens["hop_seconds"],
            text_probability,
            seed,
            fixed,
            short,
        )

    @cached_property
    def period(self) -> Fraction:
        """The grid windows start on, in seconds: there all fields start a frame together."""
        return common_period(list(self.fields)) if self.fields else Fraction(0)

    @cached_property
    def _steps(self) -> dict[str, int]:
        """Frames of each field from one place of the grid to the next."""
        return {field.name: int(self.period * field.rate) for field in self.fields}

    @cached_property
    def _frames(self) -> dict[str, int]:
        """Frames of each field in a window of `seconds`. Fractions take long: most of the time of a cut."""
        return {field.name: field.frames(self.seconds) for field in self.fields}

    def __call__(self, record: dict[str, Any], epoch: int, key: str) -> Window:
        """The window of `record` in `epoch`; `key` is its id, with more where that does not tell it from others."""
        place, choice, text, draw = _draws(self.seed, 0 if self.fixed else epoch, key)
        seconds = self.length(record)
        whole = seconds == self.seconds
        frames = self._frames if whole else {field.name: field.frames(seconds) for field in self.fields}
        last = min(((len(record[name]) - count) // self._steps[name] for name, count in frames.items()), default=0)
        start = int(place * (last + 1))
        first = {name: start * step for name, step in self._steps.items()}
        window = {name: record[name][first[name] : first[name] + count] for name, count in frames.items()}
        if self.conditioning:
            rows = record["text_conditioning"]
            if choice < self.text_probability and len(rows):
                row = rows[int(text * len(rows))]
            else:
                middle = float(start * self.period) + seconds / 2
                row = record[CONDITIONING][self._row(middle, len(record[CONDITIONING]))]
            window[CONDITIONING] = row[None]
        window[DRAW] = np.array(draw)
        return window

    def length(self, record: dict[str, Any]) -> float:
        """Seconds of the window of a record."""
        if all(len(record[name]) >= count for name, count in self._frames.items()):
            return self.seconds
        if not self.short:
            raise ValueError(f"record {record['id']} is shorter than a window of {self.seconds} s")
        return float(min(len(record[name]) // step for name, step in self._steps.items()) * self.period)

    def _row(self, middle: float, rows: int) -> int:
        """The row of the conditioning whose audio has its centre nearest to the window's `middle`, in seconds."""
        nearest = (middle - self.embedding_seconds / 2) / self.hop_seconds
        return min(max(round(nearest), 0), rows - 1)


def _draws(seed: int, epoch: int, key: str) -> tuple[float, float, float, int]:
    """Three numbers in [0, 1) and one of 63 bits, the same on every machine and with every version of numpy."""
    digest = hashlib.blake2b(f"{seed} {epoch} {key}".encode(), digest_size=32).digest()
    words = [int.from_bytes(digest[at : at + 8], "little") for at in (0, 8, 16, 24)]
    first, second, third = ((word >> 11) / 2**53 for word in words[:3])
    return first, second, third, words[3] >> 1


class WindowLoader:
    """Batches of windows for this rank; one `iter()` is one epoch, and all ranks must start it together.

    Yields `{field: int64 [batch, frames, quantizers]}`, or where windows are packed a list of them, each a batch of
    one with frames of its own; "conditioning" has one frame. Beside the fields stands DRAW, int64 [batch]: for each
    window a number of 63 bits that is a pure function of (seed, epoch, clip id), as its crop is.

    `epoch` is the epoch that is under way or, between two, the next. A state taken after any batch and loaded into a
    new loader gives exactly the batches that would have followed. Taken after a whole global batch it also gives the
    same windows of every later global batch to another number of ranks, nodes or workers and to another batch, where
    batch × ranks divides the global batch. A loader without shuffling always starts at its first batch; one with it
    goes on with an epoch left halfway.
    """

    def __init__(self, shards: Shards, batch: int, workers: int, shuffle: bool, packed: bool) -> None:
        self.epoch = 0
        self._shards, self._batch, self._shuffle = shards, batch, shuffle
        self._ranks = world_size()
        self._records = 0
        """Records all ranks have had of this epoch."""
        self._moved = False
        self._loader = DataLoader(
            shards,
            batch_size=batch,
            num_workers=workers,
            collate_fn=_apart if packed else _stacked,
            persistent_workers=workers > 0,
            worker_init_fn=partial(_start_worker, os.getpid()),
            multiprocessing_context="fork" if workers else None,  # the names of shared memory go with it
            generator=torch.Generator(),  # or else every epoch would draw from the training's random numbers
        )

    def __len__(self) -> int:
        """Batches of the whole of `epoch` on this rank."""
        return -(-self._shards.epochs.size(self.epoch) // (self._batch * self._ranks))

    def __iter__(self) -> Iterator[Any]:
        if not self._shuffle:
            self.epoch = self._records = 0
        if self._records or self._moved:
            self._shards.resume(self.epoch, self._records)
            self._moved = False
        else:
            self._shards.next_epoch = self.epoch
        try:
            for batch in self._loader:
                self._count(len(batch) if isinstance(batch, list) else len(next(iter(batch.values()))))
                yield batch
        except UserError as error:  # of a worker it comes with the worker's stack
            raise UserError(
                str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip()
            ) from None

    def close(self) -> None:
        """Ends the workers. Where Python is left to find them in a cycle, each may be waited for in vain for 5 s."""
        del self._loader

    def _count(self, records: int) -> None:
        self._records += records * self._ranks
        if self._records >= self._shards.epochs.size(self.epoch):
            self.epoch, self._records = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the stream is: after the last batch that was taken. The same on every rank, and plain JSON."""
        return {"epoch": self.epoch, "records": self._records}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next `iter()` go on where `state` was taken. Every rank must call it."""
        self.epoch, self._records = state["epoch"], state["records"]
        self._moved = True


def window_loader(
    tokens: Path | Mixture,
    split: str,
    fields: list[str],
    window_seconds: float,
    *,
    batch: int,
    seed: int,
    global_batch: int | None = None,
    text_probability: float = 0.0,
    workers: int = 0,
    shuffle: bool = True,
    packed: bool = False,
    at_most: int | None = None,
    cache: Path | None = None,
    cache_limit: int | None = None,
) -> WindowLoader:
    """Windows of `window_seconds` of a token artifact, or of several mixed, `batch` for each rank at a time.

    `fields` names what to cut, "conditioning" included where wanted: of it comes the row nearest to the window's
    middle, or with `text_probability` a caption's. With `shuffle` an epoch is whole batches of `global_batch` windows
    over all ranks, each rank's records its own, in a new order and with new crops each time; the rest is left out, and
    less than one of them is filled up by repeats. Without, every epoch is the same and all ranks get equally many
    batches, for which some records come twice; of more than `at_most` windows over all ranks so many are taken, always
    the same.
    With `packed` a batch is a list of windows, and a clip shorter than a window is one of its own length. Shards that
    are in a bucket or compressed go to the folder `cache`, which no other loader may use, at most `cache_limit` bytes.

    Raises UserError when a window is longer than the clips and for a mixture without enough clips, and ValueError for a
    `global_batch` that is missing with `shuffle`, or that the ranks cannot share out in batches.
    """
    mixture = tokens if isinstance(tokens, Mixture) else Mixture.of(tokens)
    for corpus in mixture.corpora:
        if window_seconds > corpus.info["clip_seconds"]:
            raise UserError(
                f"A window of {window_seconds:g} s (model.window_seconds of the stage) is longer than the clips "
                f"(data.clip_seconds={corpus.info['clip_seconds']:g}) of {corpus.address}."
            )
    info = mixture.corpora[0].info
    cut = Cut.of(info, fields, window_seconds, text_probability, seed, fixed=not shuffle, short=packed)
    ranks = world_size()
    if shuffle and (global_batch is None or global_batch % (batch * ranks)):
        raise ValueError(f"{ranks} ranks cannot share out a global batch of {global_batch} in batches of {batch}")
    epochs: Epochs
    if shuffle and global_batch is not None:
        epochs = mixture.epochs(split, global_batch, batch * ranks, seed)
    else:
        count = mixture.records(split)
        kept = min(count, at_most or count)
        epochs = InOrder(count, kept, -(-kept // ranks) * ranks)
    shards = Shards(
        mixture.corpora, split, cut, epochs, batch=batch, workers=workers, cache=cache, cache_limit=cache_limit
    )
    return WindowLoader(shards, batch, workers, shuffle, packed)


def _start_worker(parent: int, worker: int) -> None:
    """A worker is a copy of the training, which may have put garbage collection off, and must not outlive it: where
    streaming lets workers wait for each other they would never see that the training is gone."""
    gc.enable()
    die_with_parent(parent)


def _apart(windows: list[Window]) -> list[dict[str, Tensor]]:
    return [_stacked([window]) for window in windows]


def _stacked(windows: list[Window]) -> dict[str, Tensor]:
    # The arrays of a record are read-only views of its bytes; stacking and widening copies them.
    return {
        name: torch.from_numpy(np.stack([window[name] for window in windows]).astype(np.int64)) for name in windows[0]
    }
