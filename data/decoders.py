"""Decoding audio: soundfile for what it reads, PyAV for the rest (AAC, M4A, WMA, the sound of videos).

Both go by content, never by name, and give float32 `[frames, channels]` at the file's own rate.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import soundfile

UNKNOWN_FRAMES = 1 << 60
MOST_CHANNELS = 64
RATES = range(1_000, 1_000_001)
"""Sample rates (Hz) that sound has; a header with another is damaged."""
AV_FORMATS = (
    "aac", "ac3", "aiff", "amr", "ape", "asf", "avi", "caf", "dts", "eac3", "flv", "m4a", "matroska", "mov", "mp4",
    "mpeg", "mpegts", "tta", "webm", "wv",
)  # fmt: skip
"""What PyAV may take a file for. Playlists are not among them: these make FFmpeg open other files and addresses."""
AV_INDEXED = {"mov", "mp4", "matroska", "webm"}
"""Formats whose times are exact, so that seeking leads to the very sample."""
PREROLL_SECONDS = 1.0
"""Decoded before the place sought: codecs that overlap their frames need the one before."""


class AudioError(Exception):
    """A file, or a part of one, cannot be used. `reason` is the kind of fault, `detail` says it in words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class DamageError(Exception):
    """Decoding goes no further."""


class Decoder(Protocol):
    """An open file. `promised` is how many frames its header says it has, 0 where it does not."""

    format: str
    sample_rate: int
    channels: int
    promised: int

    def read(self, frames: int) -> np.ndarray:
        """The next frames, fewer only at the end. Raises DamageError, after which it gives no more."""

    def seek(self, frame: int) -> None:
        """Goes on from `frame`, which is ahead. Raises DamageError where that cannot be reached."""

    def is_cut_off(self) -> bool:
        """Whether the file lacks its end, though it does not say how long it should be."""


@contextlib.contextmanager
def decoder(file: io.RawIOBase) -> Iterator[Decoder]:
    """Decodes an open file. Raises AudioError ("unreadable") where that is no audio."""
    with contextlib.ExitStack() as stack:
        try:
            opened: Decoder = _SoundFile(stack.enter_context(_soundfile(file)), file)
        except soundfile.SoundFileError:
            file.seek(0)
            opened = _Av(stack.enter_context(_av(file)))
        yield _checked(opened)


def _checked(opened: Decoder) -> Decoder:
    if opened.sample_rate not in RATES:
        raise AudioError("unreadable", f"its header says a sample rate of {opened.sample_rate} Hz")
    if not 1 <= opened.channels <= MOST_CHANNELS:
        raise AudioError("unreadable", f"its header says {opened.channels} channels")
    return opened


def _soundfile(file: io.RawIOBase) -> soundfile.SoundFile:
    if isinstance(file, io.FileIO):
        # By descriptor: libsndfile then reads by itself, and takes no hints from a name.
        return soundfile.SoundFile(os.dup(file.fileno()), closefd=True)
    return soundfile.SoundFile(file)


class _SoundFile:
    def __init__(self, file: soundfile.SoundFile, raw: io.RawIOBase) -> None:
        self._file, self._raw = file, raw
        self.format, self.sample_rate, self.channels = file.format, file.samplerate, file.channels
        self.promised = _promised_frames(file)

    def read(self, frames: int) -> np.ndarray:
        try:
            return self._file.read(frames, dtype="float32", always_2d=True)
        except soundfile.SoundFileError:
            raise DamageError from None

    def seek(self, frame: int) -> None:
        try:
            self._file.seek(frame)
        except soundfile.SoundFileError:
            raise DamageError from None

    def is_cut_off(self) -> bool:
        """Whether an Ogg file ends before the page that is marked as its last."""
        if self.format != "OGG":
            return False
        end = self._raw.seek(0, io.SEEK_END)
        self._raw.seek(max(0, end - 0x20000))
        tail = self._raw.read(0x20000)
        page = tail.rfind(b"OggS")
        return page < 0 or len(tail) < page + 6 or not tail[page + 5] & 4


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


@contextlib.contextmanager
def _av(file: io.RawIOBase) -> Iterator[Any]:
    import av  # takes a moment, and few corpora need it

    av.logging.set_level(av.logging.PANIC)
    allowed = {"format_whitelist": ",".join(AV_FORMATS), "protocol_whitelist": ""}
    try:
        container = av.open(file, mode="r", metadata_errors="replace", container_options=allowed)
    except (av.error.FFmpegError, ValueError):
        raise AudioError("unreadable", "not audio that can be read") from None
    with container:
        if not container.streams.audio:
            raise AudioError("unreadable", "it holds no sound")
        yield container


class _Av:
    def __init__(self, container: Any) -> None:
        import av

        self._errors = (av.error.FFmpegError, ValueError)
        self._container, self._stream = container, container.streams.audio[0]
        self._indexed = bool(AV_INDEXED & set(container.format.name.split(",")))
        self.format = container.format.name
        self.sample_rate, self.channels = self._stream.rate or 0, self._stream.channels
        self._blocks = self._decoded()
        self._rest = np.zeros((0, self.channels), np.float32)
        self._at = 0
        """Frames given so far."""
        self._zero = 0
        """Time of the first frame, in units of the stream."""
        first = self._next()
        if first is None:
            raise AudioError("unreadable", "its sound cannot be decoded")
        self._zero, self._rest = first
        self.promised = self._promised()

    def _promised(self) -> int:
        # Other formats estimate it from the bit rate.
        if not self._indexed:
            return 0
        if self._stream.duration:
            return round(float(self._stream.duration * self._stream.time_base) * self.sample_rate)
        return round((self._container.duration or 0) / 1e6 * self.sample_rate)

    def _decoded(self) -> Iterator[tuple[int, np.ndarray]]:
        """Time stamps and blocks of frames."""
        import av

        to_float = av.AudioResampler(format="fltp", layout=self._stream.layout, rate=self.sample_rate)
        for frame in self._container.decode(self._stream):
            for block in to_float.resample(frame):
                yield frame.pts or 0, block.to_ndarray().T

    def _next(self) -> tuple[int, np.ndarray] | None:
        try:
            return next(self._blocks, None)
        except self._errors:
            return None

    def read(self, frames: int) -> np.ndarray:
        blocks, held = [self._rest], len(self._rest)
        try:
            while held < frames and (block := next(self._blocks, None)) is not None:
                blocks.append(block[1])
                held += len(block[1])
        except self._errors:
            if not held:
                raise DamageError from None
            self._blocks = _damaged()
        joined = np.concatenate(blocks)
        self._rest = joined[frames:]
        self._at += min(frames, len(joined))
        return joined[:frames]

    def seek(self, frame: int) -> None:
        at, before = self._at, frame - round(PREROLL_SECONDS * self.sample_rate)
        if self._indexed and before > at:
            units = 1 / (self._stream.time_base * self.sample_rate)
            try:
                self._container.seek(self._zero + int(before * units), stream=self._stream)
            except self._errors:
                raise DamageError from None
            self._blocks = self._decoded()
            found = self._next()
            if found is None:
                raise DamageError
            at, self._rest = round((found[0] - self._zero) / units), found[1]
        if frame < at:
            raise DamageError
        while at < frame:
            skipped = len(self.read(min(frame - at, self.sample_rate)))
            if not skipped:
                raise DamageError
            at += skipped

    def is_cut_off(self) -> bool:
        return False


def _damaged() -> Iterator[Any]:
    raise DamageError
    yield
