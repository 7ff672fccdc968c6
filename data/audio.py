"""Reading audio: any rate, any number of channels, by content and not by name, in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

from data.config import Downmix
from data.decoders import AudioError, DamageError, Decoder, decoder
from data.levels import check_samples
from data.storage import opened

BLOCK = 1 << 14
"""Frames decoded at a time. Where a damaged file stops decoding, at most this many good ones before it are lost."""
SHORTEST = 0.9
"""Share of a clip that must be there; the rest is padded with silence."""
COMPLETE = 0.98
"""A file that gives less than this share of what its header promises is truncated: headers are not exact."""
MOST_FRAMES = 1 << 60
TIME_TOLERANCE = 0.1
"""Seconds by which an `end` may lie beyond the end of its file: times are rounded, and MP3 has padding."""


@dataclass(frozen=True)
class AudioFile:
    """What a file is, whatever can be read of it."""

    format: str
    sample_rate: int
    channels: int
    seconds: float


@dataclass(frozen=True)
class Piece:
    """Part of a file: `samples` are float32 `[frames, channels]` at the file's own `rate`, from `start` seconds on."""

    start: float
    samples: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def probe(path: Path | str) -> AudioFile:
    """Format, rate, channels and length of a file, which is decoded where its header does not say how long it is.

    Raises AudioError ("missing", "unreadable" or "empty").
    """
    with _open(path) as file:
        frames = file.promised or _decode_to(file, MOST_FRAMES)
        return AudioFile(file.format, file.sample_rate, file.channels, frames / file.sample_rate)


def pieces(path: Path | str, seconds: float, start: float = 0.0, end: float | None = None) -> Iterator[Piece]:
    """A file, or its part from `start` to `end` (seconds), cut into pieces of `seconds`, of which the last is shorter.

    At the point where a damaged file stops decoding the pieces end, and AudioError ("truncated") is raised after the
    last of them; also when the file ends well short of what its header promises. Raises AudioError ("missing",
    "unreadable", "empty", or "wrong times" where it ends before `start`) before the first, and "wrong times" after the
    last where it ends before `end`.
    """
    with _open(path) as file:
        rate = file.sample_rate
        first = _skip_to(file, round(start * rate))
        last = None if end is None else round(end * rate)
        at, number, damaged, complete = first, 0, False, True
        while complete and (last is None or at < last):
            wanted = first + round((number + 1) * seconds * rate) - at
            wanted = wanted if last is None else min(wanted, last - at)
            samples, damaged = _read(file, wanted)
            if len(samples):
                yield Piece(start + number * seconds, samples, rate)
            number, at, complete = number + 1, at + len(samples), len(samples) == wanted
        if complete and last is not None:
            return
        short = at < COMPLETE * file.promised
        if damaged or short or file.is_cut_off():
            whole = f" of {file.promised / rate:.1f}" if short else ""
            raise AudioError("truncated", f"only the first {at / rate:.1f}{whole} s can be read")
        if not at:
            raise AudioError("empty", "it holds no samples")
        if last is not None and at < last - TIME_TOLERANCE * rate:
            raise AudioError("wrong times", f"it ends at {at / rate:.1f} s, before the end asked for, {end:g} s")


def downmix(samples: np.ndarray, policy: Downmix) -> np.ndarray:
    """Mono float32 `[frames]` of `samples` `[frames, channels]`: the mean of the channels, the left or the right one
    (of a mono file the only one), or the one of most energy."""
    if policy == "mix":
        with np.errstate(invalid="ignore", over="ignore"):
            return samples.mean(axis=1)
    if policy == "loudest":
        with np.errstate(invalid="ignore", over="ignore"):
            return samples[:, int(np.square(samples, dtype=np.float64).sum(axis=0).argmax())]
    return samples[:, 0 if policy == "left" else min(1, samples.shape[1] - 1)]


def resample(wave: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """`wave` (`[samples]` or `[samples, channels]` at `rate`) at `sample_rate`, whatever the ratio of the two."""
    return wave if rate == sample_rate else soxr.resample(wave, rate, sample_rate)


def read(
    path: Path | str,
    start: float,
    seconds: float,
    sample_rate: int,
    channels: int = 1,
    policy: Downmix = "mix",
    gain: float = 1.0,
) -> np.ndarray:
    """`seconds` of a file from `start` on, times `gain`: float32 in [-1, 1], `[round(seconds × sample_rate)]` for one
    channel, made by `policy`, and `[2, …]` for two: a mono file twice, the first two channels of one that has more.

    What is missing at the end of the file is silence. Raises AudioError when the file is "missing", "unreadable" or
    "empty", when less than SHORTEST of the stretch can be read ("truncated") or it holds samples that are no audio.
    """
    with _open(path) as file:
        rate = file.sample_rate
        first, frames = round(start * rate), round(seconds * rate)
        samples = _read_from(file, first, frames)
    if len(samples) < SHORTEST * frames:  # seeking stumbles over damage that reading on does not meet
        with _open(path) as file:
            samples = _read(file, frames)[0] if _decode_to(file, first) == first else samples[:0]
    if len(samples) < SHORTEST * frames:
        raise AudioError("truncated", f"it has {len(samples) / rate:.2f} s from {start:g} s on, {seconds:g} s expected")
    check_samples(samples)
    chosen = downmix(samples, policy)[:, None] if channels == 1 else samples[:, [0, min(1, samples.shape[1] - 1)]]
    wave = resample(np.ascontiguousarray(chosen), rate, sample_rate)
    out = np.zeros((channels, round(seconds * sample_rate)), dtype=np.float32)
    out[:, : len(wave)] = gain * wave[: out.shape[1]].T
    return np.clip(out[0] if channels == 1 else out, -1.0, 1.0)


def read_mono(path: Path | str, start: float, seconds: float, sample_rate: int) -> np.ndarray:
    """`seconds` of a file from `start` on, mono: see `read`."""
    return read(path, start, seconds, sample_rate)


@contextlib.contextmanager
def _open(path: Path | str) -> Iterator[Decoder]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(opened(str(path)))
            content = bool(file.read(1))
            file.seek(0)
        except FileNotFoundError as error:
            raise AudioError("missing", error.strerror or str(error)) from None
        except OSError as error:
            raise AudioError("unreadable", error.strerror or str(error)) from None
        if not content:
            raise AudioError("empty", "the file has no bytes")
        yield stack.enter_context(decoder(file))


def _read(file: Decoder, frames: int) -> tuple[np.ndarray, bool]:
    """The next `frames`, fewer at the end, and whether decoding failed there."""
    blocks, left = [np.zeros((0, file.channels), np.float32)], frames
    while left > 0:
        try:
            block = file.read(min(left, BLOCK))
        except DamageError:
            return np.concatenate(blocks), True
        if not len(block):
            break
        blocks.append(block)
        left -= len(block)
    return np.concatenate(blocks), False


def _read_from(file: Decoder, first: int, frames: int) -> np.ndarray:
    try:
        file.seek(first)
    except DamageError:
        return np.zeros((0, file.channels), np.float32)
    return _read(file, frames)[0]


def _skip_to(file: Decoder, first: int) -> int:
    """Goes to `first`. Raises AudioError ("wrong times", or "truncated") where the file ends before."""
    if not first:
        return 0
    seconds = first / file.sample_rate
    try:
        if not file.promised or first < file.promised:
            file.seek(first)
            return first
    except DamageError:
        if file.promised:
            raise AudioError("truncated", f"it cannot be read at {seconds:g} s, where it should start") from None
    raise AudioError("wrong times", f"it ends before the start asked for, {seconds:g} s")


def _decode_to(file: Decoder, first: int) -> int:
    """Reads up to `first`, which seeking did not reach, and returns where that got."""
    at = 0
    while at < first:
        samples, damaged = _read(file, min(first - at, BLOCK))
        at += len(samples)
        if damaged or not len(samples):
            break
    return at
