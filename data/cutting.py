"""From items to clips: each is decoded once, cut, and every clip judged. What worker processes do."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from data.audio import SHORTEST, Piece, downmix, pieces
from data.config import DataConfig
from data.decoders import AudioError
from data.levels import CLIPPED, INVALID, SILENT, check_clipping, check_samples, check_silence, loudness_gain
from data.sources.base import Item, Part, Skipped

CLIP_FAULTS = (SILENT, CLIPPED, INVALID)
"""Reasons that concern one clip, not its whole file."""


@dataclass(frozen=True)
class Cut:
    """A good clip of an item: start and length in seconds, its gain, and a digest of its samples."""

    start: float
    seconds: float
    gain: float
    digest: bytes


@dataclass
class Found:
    """The good clips of an item, and why the others, or all, are not: reason and detail."""

    item: Item
    clips: list[Cut] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)

    def skipped(self) -> Iterator[Skipped]:
        """A line of the report for each kind of fault, with the first of its kind for all."""
        counts = Counter(reason for reason, _ in self.faults)
        for reason, count in counts.items():
            detail = next(detail for own, detail in self.faults if own == reason)
            more = f"; {count - 1} more clips like this" if count > 1 else ""
            yield Skipped(self.item.name, reason, detail + more, len(self.clips))


def needed_seconds(config: DataConfig) -> float:
    """Seconds of audio that make a clip."""
    return SHORTEST * config.clip_seconds if config.shortest_seconds is None else config.shortest_seconds


def cut_part(task: tuple[Part, DataConfig]) -> list[Found | Skipped]:
    """All items of a part of a source."""
    part, config = task
    return [item if isinstance(item, Skipped) else _cut(item, config) for item in part.items()]


def lost_part(task: tuple[Part, DataConfig]) -> list[Found | Skipped]:
    """What stands for a part whose decoder ended the process."""
    return [Skipped(task[0].name, "unreadable", "reading it crashed a process, or took more memory than there is")]


def _cut(item: Item, config: DataConfig) -> Found:
    found = Found(item, faults=list(item.notes))
    short = None
    try:
        for piece in pieces(item.path, config.clip_seconds, item.start, item.end):
            seconds = _length(piece, config)
            if seconds is None:
                if piece.start == item.start:
                    lasts = f"it lasts {piece.seconds:.2f} s; a clip needs {needed_seconds(config):g} s"
                    short = ("too short", lasts)
                continue
            try:
                found.clips.append(_judged(piece, seconds, config))
            except AudioError as error:
                found.faults.append((error.reason, f"at {piece.start:g} s {error.detail}"))
    except AudioError as error:
        # Where it ends early that is the news, not that what came before is short.
        short = None
        if error.reason != "unreadable" or item.expected:
            found.faults.append((error.reason, error.detail))
    found.faults += [short] if short else []
    return found


def _length(piece: Piece, config: DataConfig) -> float | None:
    """Seconds of the clip that `piece` makes, or None where it is too short for one."""
    # Where a clip is no whole number of samples, every other piece lacks one.
    whole = piece.seconds > config.clip_seconds - 1 / piece.rate
    if not whole and piece.seconds < needed_seconds(config):
        return None
    return config.clip_seconds if whole or config.shortest_seconds is None else piece.seconds


def _judged(piece: Piece, seconds: float, config: DataConfig) -> Cut:
    """Raises AudioError for a clip that cannot be used."""
    check_samples(piece.samples)
    wave = downmix(piece.samples, config.channels)
    check_silence(wave, piece.rate, config.silence_db)
    if config.most_clipped is not None:
        check_clipping(piece.samples, config.most_clipped)
    gain = 1.0
    if config.loudness is not None:
        gain = loudness_gain(wave, piece.rate, config.loudness, float(np.abs(piece.samples).max()))
    return Cut(piece.start, seconds, gain, _digest(wave, piece.rate))


def _digest(wave: np.ndarray, rate: int) -> bytes:
    """The same for the same samples, whichever container they came in."""
    return hashlib.blake2b(np.ascontiguousarray(wave).data, digest_size=16, key=str(rate).encode()).digest()
