"""What is tokenised together: fixed parts of a corpus, which any number of ranks share out among them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from data.corpus import Clip
from data.ranks import Ranks

FEWEST_PARTS = 32
"""A small corpus has so many parts all the same, or as many as it has clips: more ranks find work."""


@dataclass(frozen=True)
class Part:
    """Clips of one split that lie together in the corpus: they become one shard, whoever makes it."""

    split: str
    number: int
    clips: tuple[Clip, ...]

    @property
    def key(self) -> tuple[str, int]:
        return self.split, self.number


def plan_parts(clips: dict[str, list[Clip]], shard_seconds: float) -> list[Part]:
    """The clips of each split cut into parts of about `shard_seconds` of audio. Nothing else changes the cuts."""
    total = sum(clip.seconds for split in clips.values() for clip in split)
    wanted = min(shard_seconds, total / FEWEST_PARTS)
    parts = []
    for split, rows in clips.items():
        count = max(1, min(len(rows), round(sum(clip.seconds for clip in rows) / wanted)))
        cuts = [len(rows) * number // count for number in range(count + 1)]
        parts += [Part(split, number, tuple(rows[cuts[number] : cuts[number + 1]])) for number in range(count)]
    return parts


def batches(clips: tuple[Clip, ...], batch_seconds: float) -> list[tuple[Clip, ...]]:
    """Neighbours of one length together: padding would change what the encoders make of the real frames."""
    found = []
    for seconds, group in groupby(clips, key=lambda clip: clip.seconds):
        alike, size = list(group), max(1, int(batch_seconds // seconds))
        found += [tuple(alike[first : first + size]) for first in range(0, len(alike), size)]
    return found


class Claims:
    """Which rank makes which part: the one that asks first, so that a slow rank holds up nobody.

    A claim is a file in `folder`, which all ranks see, that only one process can make. Those of an earlier attempt are
    cleared by rank 0 first; all ranks must open the claims together.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder = folder
        if ranks.leads:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        ranks.barrier()

    def taken(self, parts: list[Part]) -> Iterator[Part]:
        """Those of `parts` that this process is the first to ask for."""
        for part in parts:
            try:
                os.close(os.open(self._folder / f"{part.split}-{part.number:06d}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            yield part
