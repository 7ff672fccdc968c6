"""The corpus artifact: a list of clips with their captions, and the prompts to evaluate with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.audio import AudioError, read
from data.config import Downmix
from data.storage import STRETCH, is_remote
from model.errors import UserError

CLIPS = "clips.jsonl"
PROMPTS = "prompts.jsonl"
SKIPPED = "skipped.jsonl"
TRAIN = "train"
VALIDATION = "validation"
TEST = "test"
HELD_OUT = "held_out"


@dataclass(frozen=True)
class Clip:
    """`seconds` of audio, from `start` (seconds) on.

    `path` is all that is needed to find it: relative to the corpus folder for the built-in corpus, or what data.storage
    opens, which may be a stretch of a file, here or in a bucket. `attributes` are what the music is known to be
    (built-in corpus), or None; `columns` what a manifest says of it. `gain` is the linear factor that brings it to the
    loudness asked for, `channels` how its mono is made.
    """

    id: str
    path: str
    start: float
    seconds: float
    captions: tuple[str, ...]
    split: str
    attributes: dict[str, str] | None = None
    columns: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    gain: float = 1.0
    channels: Downmix = "mix"


class ClipError(UserError):
    """The audio of one clip is no longer what it was when the corpus was made."""


@dataclass(frozen=True)
class Prompt:
    """A text to evaluate with, and the attributes music that follows it would have, where known."""

    prompt: str
    attributes: dict[str, str] | None = None


def read_clips(corpus: Path, split: str | None = None, *, short: bool = False) -> list[Clip]:
    """The clips of a corpus folder in their stored order, of all splits or of one.

    They have one length, that of the longest, as those who fit and judge on batches of audio want it; with `short`
    those that are shorter are among them.
    """
    clips = [Clip(**{**row, "captions": tuple(row["captions"])}) for row in read_jsonl(corpus / CLIPS)]
    longest = max((clip.seconds for clip in clips), default=0.0)
    return [clip for clip in clips if split in (None, clip.split) and (short or clip.seconds == longest)]


def write_clips(folder: Path, clips: Iterable[Clip]) -> None:
    """Writes the clip list of a corpus folder."""
    write_jsonl(folder / CLIPS, (asdict(clip) for clip in clips))


def load_clip(corpus: Path, clip: Clip, sample_rate: int, channels: int = 1) -> np.ndarray:
    """The waveform of a clip in [-1, 1]: float32 `[round(seconds × sample_rate)]`, mono, or `[2, …]` for two
    `channels`.

    Safe to call from several threads. Raises ClipError when the audio is no longer what it was when the corpus was
    made, and UserError when its bucket is out of reach.
    """
    path = clip.path if STRETCH.fullmatch(clip.path) or is_remote(clip.path) else str(corpus / clip.path)
    try:
        return read(path, clip.start, clip.seconds, sample_rate, channels, clip.channels, clip.gain)
    except AudioError as error:
        raise ClipError(
            f"{path} has changed since the corpus was made ({error}). The same command again looks at the audio anew."
        ) from None


def read_prompts(corpus: Path) -> list[Prompt]:
    """The evaluation prompts of a corpus folder."""
    return [Prompt(**row) for row in read_jsonl(corpus / PROMPTS)]


def write_prompts(folder: Path, prompts: Iterable[Prompt]) -> None:
    """Writes the evaluation prompts of a corpus folder."""
    write_jsonl(folder / PROMPTS, (asdict(prompt) for prompt in prompts))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object a line."""
    # Not str.splitlines: captions may hold characters that it takes for line ends, such as U+2028.
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return [json.loads(line) for line in file if line.strip()]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    # File names need not be text; the escape keeps their bytes.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
