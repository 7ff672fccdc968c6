"""Reading audio files: any rate, any number of channels, by content and not by name, in bounded memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

BLOCK = 1 << 14
"""Frames decoded at a time. Where a damaged file stops decoding, at most this many good ones before it are lost."""
SHORTEST = 0.9
"""Share of a clip that must be there; the rest is padded with silence."""
COMPLETE = 0.98
"""A file that gives less than this share of what its header promises is truncated: headers are not exact."""
LOUDEST = 16.0
"""Samples beyond this are no waveform in [-1, 1]: a float file holds integers, or garbage."""
UNKNOWN_FRAMES = 1 << 60
LOUDNESS_SECONDS = 0.05


class AudioError(Exception):
    """A file, or a part of one, cannot be used. `reason` is the kind of fault, `detail` says it in words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class AudioFile:
    """What the header of a file says, whatever can be read of it."""

    format: str
    sample_rate: int
    channels: int
    seconds: float


@dataclass(frozen=True)
class Piece:
    """Part of a file: `wave` is mono float32 at the file's own `rate`, starting at `start` seconds."""

    start: float
    wave: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.wave) / self.rate


def probe(path: Path) -> AudioFile:
    """Format, rate, channels and length of a file. Raises AudioError ("unreadable" or "empty")."""
    with _open(path) as file:
        seconds = _promised_frames(file) / file.samplerate
        return AudioFile(file.format, file.samplerate, file.channels, seconds)


def pieces(path: Path, seconds: float) -> Iterator[Piece]:
    """A file cut from its start into pieces of `seconds`, of which the last is shorter.

    At the point where a damaged file stops decoding the pieces end, and AudioError ("truncated") is raised after the
    last of them; also when the file ends well short of what its header promises. Raises AudioError ("unreadable" or
    "empty") before the first.
    """
    with _open(path) as file:
        rate, number, end, damaged, complete = file.samplerate, 0, 0, False, True
        while complete:
            wanted = round((number + 1) * seconds * rate) - end
            wave, damaged = _read(file, wanted)
            if len(wave):
                yield Piece(number * seconds, wave, rate)
            number, end, complete = number + 1, end + len(wave), len(wave) == wanted
        promised = _promised_frames(file)
        if damaged or end < COMPLETE * promised or _lacks_last_page(path, file):
            whole = f" of {promised / rate:.1f}" if end < COMPLETE * promised else ""
            raise AudioError("truncated", f"only the first {end / rate:.1f}{whole} s can be read")
        if not end:
            raise AudioError("empty", "it holds no samples")


def check(wave: np.ndarray, rate: int, silence_db: float) -> None:
    """Raises AudioError when a mono `wave` is "silent" or has "invalid samples" (not finite, or far above full scale).

    It is silent when the loudest 50 ms, without their mean, stay below `silence_db` (dB full scale).
    """
    peak = float(np.abs(wave).max(initial=0.0))
    if not peak <= LOUDEST:  # true for NaN as well
        raise AudioError("invalid samples", f"its largest sample is {peak:g}, where 1 is full scale")
    window = min(len(wave), max(1, round(LOUDNESS_SECONDS * rate)))
    windows = wave[: len(wave) // window * window].reshape(-1, window) if window else np.zeros((1, 1))
    level = 20 * np.log10(max(float(windows.std(axis=1).max()), 1e-10))
    if level < silence_db:
        raise AudioError("silent", f"its loudest moment is at {level:.0f} dB of full scale")


def resample(wave: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """`wave` (samples at `rate`) at `sample_rate`, whatever the ratio of the two."""
    return wave if rate == sample_rate else soxr.resample(wave, rate, sample_rate)


def read_mono(path: Path, start: float, seconds: float, sample_rate: int) -> np.ndarray:
    """`seconds` of a file from `start` on: float32 `[round(seconds × sample_rate)]`, channels averaged, in [-1, 1].

    What is missing at the end of the file is silence. Raises AudioError when the file is "unreadable" or "empty", when
    less than SHORTEST of the stretch can be read ("truncated") or it holds samples that are no audio.
    """
    with _open(path) as file:
        rate = file.samplerate
        first, frames = round(start * rate), round(seconds * rate)
        wave = _read_from(file, first, frames)
    if len(wave) < SHORTEST * frames:  # seeking stumbles over damage that reading on does not meet
        with _open(path) as file:
            wave = _skip_to(file, first, frames)
    if len(wave) < SHORTEST * frames:
        raise AudioError("truncated", f"it has {len(wave) / rate:.2f} s from {start:g} s on, {seconds:g} s expected")
    check(wave, rate, silence_db=-np.inf)
    wave = resample(wave, rate, sample_rate)
    out = np.zeros(round(seconds * sample_rate), dtype=np.float32)
    out[: len(wave)] = wave[: len(out)]
    return np.clip(out, -1.0, 1.0)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[soundfile.SoundFile]:
    """Opens by file descriptor: soundfile would take hints from a name."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise AudioError("unreadable", error.strerror or str(error)) from None
    if not os.fstat(handle).st_size:
        os.close(handle)
        raise AudioError("empty", "the file has no bytes")
    try:
        file = soundfile.SoundFile(handle, closefd=True)
    except soundfile.SoundFileError:
        raise AudioError("unreadable", "not audio that can be read: WAV, FLAC, OGG, Opus, MP3 and AIFF can") from None
    with file:
        yield file


def _read(file: soundfile.SoundFile, frames: int) -> tuple[np.ndarray, bool]:
    """The next `frames` as mono float32, fewer at the end, and whether decoding failed there."""
    blocks, left = [np.zeros(0, np.float32)], frames
    while left > 0:
        try:
            block = file.read(min(left, BLOCK), dtype="float32", always_2d=True)
        except soundfile.SoundFileError:
            return np.concatenate(blocks), True
        if not len(block):
            break
        with np.errstate(invalid="ignore", over="ignore"):
            blocks.append(block.mean(axis=1))
        left -= len(block)
    return np.concatenate(blocks), False


def _read_from(file: soundfile.SoundFile, first: int, frames: int) -> np.ndarray:
    try:
        file.seek(first)
    except soundfile.SoundFileError:
        return np.zeros(0, np.float32)
    return _read(file, frames)[0]


def _skip_to(file: soundfile.SoundFile, first: int, frames: int) -> np.ndarray:
    """As `_read_from`, by decoding all that comes before."""
    while first > 0:
        wave, damaged = _read(file, min(first, BLOCK))
        if damaged or not len(wave):
            return np.zeros(0, np.float32)
        first -= len(wave)
    return _read(file, frames)[0]


def _promised_frames(file: soundfile.SoundFile) -> int:
    """Frames the file should have, or 0 where its header does not say."""
    if file.frames >= UNKNOWN_FRAMES:
        return 0
    # For WAV and AIFF libsndfile counts what is there, and notes what the header says.
    note = re.search(r"^ *(?:data|SSND) *: (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if not note:
        return file.frames
    promised, found = int(note[1]), int(note[2])
    # Programs that write to a pipe cannot know the length and leave the largest number, or nearly.
    known = found < promised < 0x7FFF_0000
    return round(file.frames * promised / found) if known and found else file.frames


def _lacks_last_page(path: Path, file: soundfile.SoundFile) -> bool:
    """Whether an Ogg file ends before the page that is marked as its last."""
    if file.format != "OGG":
        return False
    with path.open("rb") as raw:
        raw.seek(max(0, path.stat().st_size - 0x20000))
        tail = raw.read()
    page = tail.rfind(b"OggS")
    return page < 0 or len(tail) < page + 6 or not tail[page + 5] & 4
