"""What a source of audio is, and what it yields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from data.tag_captions import Tags

Value = str | int | float | bool | None
"""What a column of a manifest holds."""

AUDIO_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        "wav", "wave", "w64", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "au", "caf", "m4a", "aac", "wma",
    )
)  # fmt: skip
"""Files so named are reported when they do not read as audio; others (pictures, notes) are passed over."""
CLOUD_SUFFIXES = AUDIO_SUFFIXES | {".mp4", ".m4b", ".mka", ".mkv", ".webm", ".mov", ".ac3", ".amr", ".ape", ".wv"}
"""Objects so named are fetched from a bucket and looked into: others cost too much for what they are."""


@dataclass(frozen=True)
class Skipped:
    """What is not used, or not all of it. `file` is relative to the source."""

    file: str
    reason: str
    detail: str
    clips: int = 0
    """Clips of the file that are used all the same."""


@dataclass(frozen=True)
class Item:
    """One piece of audio: a file, or a stretch of one."""

    name: str
    """What reports call it; stays the same when the source grows or moves."""
    path: str
    """Where its bytes are (data.storage)."""
    captions: tuple[str, ...] = ()
    tags: Tags = field(default_factory=dict)
    """For captions where there are none."""
    start: float = 0.0
    end: float | None = None
    """Seconds; None is the end of the file."""
    split: str | None = None
    """Where the source says it."""
    id: str | None = None
    columns: dict[str, Value] = field(default_factory=dict)
    expected: bool = True
    """Whether it is audio for sure, so that it is reported where it does not read as audio."""
    notes: tuple[tuple[str, str], ...] = ()
    """Reason and detail of what is wrong with it though it can be used."""

    @property
    def key(self) -> str:
        """Tells it from all others: two items of one key are one item given twice."""
        return f"id {self.id}" if self.id is not None else f"{self.name} from {self.start:g}"


class Part(Protocol):
    """What a worker process is given at a time: a file, a row, or a shard of many."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def items(self) -> Iterator[Item | Skipped]:
        """What it holds."""


class Source(Protocol):
    """Where the audio comes from."""

    place: str
    """The folder, file or address, for messages."""
    parts_a_process: int
    """Fewer parts than this are not worth starting another process for."""

    def parts(self) -> Sequence[Part]:
        """All of it, in a fixed order. Raises UserError where the source as a whole cannot be used."""

    def skipped(self) -> list[Skipped]:
        """What `parts` left out."""

    def fingerprint(self) -> str:
        """Changes when any of it does, by names, sizes and times or tags: no audio is read."""
