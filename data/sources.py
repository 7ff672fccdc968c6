"""A user's own audio: a folder of files → a corpus of clips, whatever state the files are in."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.audio import SHORTEST, AudioError, Piece, check, pieces
from data.caption_files import Captions, captions_file
from data.config import DataConfig
from data.corpus import SKIPPED, TRAIN, VALIDATION, Clip, Prompt, write_clips, write_jsonl, write_prompts
from data.pool import over_processes
from data.progress import Progress
from model.artifact import fingerprint
from model.errors import UserError

AUDIO_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        "wav",
        "wave",
        "w64",
        "flac",
        "ogg",
        "oga",
        "opus",
        "mp3",
        "aif",
        "aiff",
        "au",
        "caf",
        "m4a",
        "aac",
        "wma",
    )
)
"""Files so named are reported when they do not read as audio; others (pictures, notes) are passed over."""
TEXT_SUFFIXES = frozenset({".txt", ".csv", ".jsonl", ".json", ".md", ".yaml", ".yml"})
PROMPTS = 64
RUN_MARK = "recipe.yaml"
"""A folder that holds this is a run of Stretto: what it made is not material."""


@dataclass(frozen=True)
class Skipped:
    """What is not used, or not all of it. `file` is relative to the audio folder."""

    file: str
    reason: str
    detail: str
    clips: int = 0
    """Clips of the file that are used all the same."""


@dataclass(frozen=True)
class _Task:
    path: Path
    clip_seconds: float
    shortest_seconds: float | None
    silence_db: float

    @property
    def needed(self) -> float:
        """Seconds of audio that make a clip."""
        return SHORTEST * self.clip_seconds if self.shortest_seconds is None else self.shortest_seconds

    def length(self, piece: Piece) -> float | None:
        """Seconds of the clip that `piece` makes, or None where it is too short for one."""
        # Where a clip is no whole number of samples, every other piece lacks one.
        whole = piece.seconds > self.clip_seconds - 1 / piece.rate
        if not whole and piece.seconds < self.needed:
            return None
        return self.clip_seconds if whole or self.shortest_seconds is None else piece.seconds


@dataclass
class _Found:
    """What one file holds: start and length of its good clips (seconds), and why the others are not."""

    path: Path
    clips: list[tuple[float, float]] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)


def index_folder(folder: Path, config: DataConfig, seed: int, progress: Progress) -> dict[str, Any]:
    """Fills `folder` with the clip list of the user's audio in `config.audio`, prompts, and what was skipped and why.

    Every file, whatever its name, is decoded once and cut into clips of `config.clip_seconds` that do not overlap. A
    last part of at least 90 % of a clip is one as well, padded with silence, or with `config.shortest_seconds` one of
    at least that length, which keeps its own; a shorter one is left out. The audio stays where it is. Validation takes
    whole files, chosen by `seed`; the clips at its end where but one file has clips of full length.

    Returns what the artifact's manifest says of it. Raises UserError when the folder or the captions file cannot be
    used or nothing is left.
    """
    root = _audio_folder(config)
    files = audio_files(root)
    captions = Captions(captions_file(config.captions, root), root, files)
    found = _inspect(files, config, progress)
    skipped = [row for one in found if (row := _skipped(one, root))]
    usable = [one for one in found if one.clips]
    if not usable:
        raise UserError(_nothing_left(root, config, skipped))
    clips: list[Clip] = []
    for one, splits in zip(usable, _splits(usable, root, config, seed), strict=True):
        try:
            texts = captions.of(one.path)
        except UnicodeDecodeError:
            texts = ()
            skipped.append(
                Skipped(_name(one.path, root), "captions not readable", "NAME.txt is not UTF-8 text", len(splits))
            )
        for (start, seconds), split in zip(one.clips, splits, strict=True):
            clips.append(Clip(f"clip-{len(clips):06d}", str(one.path), start, seconds, texts, split))
    skipped += [
        Skipped(name, "caption names a missing file", f"line {line} of the captions file")
        for name, line in captions.missing
    ]
    write_clips(folder, clips)
    write_jsonl(folder / SKIPPED, (asdict(row) for row in skipped))
    write_prompts(folder, _prompts(clips))
    return _info(clips, usable, skipped, config)


def sources_fingerprint(config: DataConfig) -> str:
    """Changes when a file of the audio folder or the captions file is added, removed or changed (size or time).

    Nothing is read, so it is quick. Raises UserError when `config.audio` is no folder or the captions file is missing.
    """
    root = _audio_folder(config)
    captions = captions_file(config.captions, root)
    files = [*all_files(root), *([captions] if captions else [])]
    stats = [(str(path), path.stat()) for path in files]
    digest = hashlib.sha256()
    for name, stat in stats:
        digest.update(os.fsencode(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))
    return fingerprint(str(root), digest.hexdigest())


def audio_files(folder: Path) -> list[Path]:
    """The files below `folder` that may hold audio, sorted by path."""
    return [path for path in all_files(folder) if path.suffix.lower() not in TEXT_SUFFIXES]


def all_files(folder: Path) -> list[Path]:
    """Every file below `folder` once, sorted by path; hidden ones and earlier runs' are left out.

    Links are followed. A file that several paths lead to stands under its own, where that lies in the folder.
    """
    found: dict[str, Path] = {}
    for path in _walk(folder, ()):
        real = os.path.realpath(path)
        if real not in found or str(path) == real:
            found[real] = path
    return sorted(found.values())


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back up
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        return
    if above and any(entry.name == RUN_MARK for entry in entries):
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path), (*above, real))
        elif entry.is_file():  # not a pipe or a device, which would block
            yield Path(entry.path)


def _audio_folder(config: DataConfig) -> Path:
    assert config.audio is not None
    folder = Path(config.audio).expanduser()
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"data.audio must be a folder of audio files; {folder} {kind}.")
    return folder.resolve()


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _inspect(files: list[Path], config: DataConfig, progress: Progress) -> list[_Found]:
    tasks = [_Task(path, config.clip_seconds, config.shortest_seconds, config.silence_db) for path in files]
    found = []
    for one in over_processes(_inspect_one, tasks, tasks_a_process=32, chunk=4):
        found.append(one)
        progress.update(len(found), len(tasks), "reading audio")
    return found


def _inspect_one(task: _Task) -> _Found:
    """Decodes one file and judges its clips."""
    found = _Found(task.path)
    try:
        for piece in pieces(task.path, task.clip_seconds):
            seconds = task.length(piece)
            if seconds is None:
                if piece.start == 0:
                    lasts = f"it lasts {piece.seconds:.2f} s; a clip needs {task.needed:g} s"
                    found.faults.append(("too short", lasts))
                continue
            try:
                check(piece.wave, piece.rate, task.silence_db)
                found.clips.append((piece.start, seconds))
            except AudioError as error:
                found.faults.append((error.reason, f"at {piece.start:g} s {error.detail}"))
    except AudioError as error:
        # Where it ends early that is the news, not that what came before is short.
        found.faults.insert(0, (error.reason, error.detail))
    return found


def _skipped(found: _Found, root: Path) -> Skipped | None:
    """The line of the report for a file that is not used or not all of it: its first fault stands for all."""
    if not found.faults:
        return None
    reason, detail = found.faults[0]
    if reason == "unreadable" and found.path.suffix.lower() not in AUDIO_SUFFIXES:
        return None
    alike = sum(fault == reason for fault, _ in found.faults)
    if alike > 1:
        detail += f"; {alike - 1} more clips like this"
    return Skipped(_name(found.path, root), reason, detail, len(found.clips))


def _nothing_left(root: Path, config: DataConfig, skipped: list[Skipped]) -> str:
    if not skipped:
        return f"data.audio: {root} holds no audio files (WAV, FLAC, OGG, Opus, MP3 or AIFF)."
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(row.reason for row in skipped).most_common())
    first = skipped[0]
    return (
        f"data.audio: no file in {root} can be used ({reasons}), for example {first.file}: {first.detail}. "
        f"Clips last data.clip_seconds={config.clip_seconds:g} s and reach data.silence_db={config.silence_db:g} dB."
    )


def _splits(usable: list[_Found], root: Path, config: DataConfig, seed: int) -> list[list[str]]:
    """For each file the split of each of its clips. Whole files go to validation, in an order drawn by `seed`, until it
    has its share of the clips; a file that would make it more than twice that is passed over where others remain.
    Both splits have a clip of full length.
    """
    sizes = [len(one.clips) for one in usable]
    full = [sum(seconds == config.clip_seconds for _, seconds in one.clips) for one in usable]
    if sum(full) < 2:
        raise UserError(
            f"data.audio: {root} gives {'one clip' if sum(full) else 'no clip'} of {config.clip_seconds:g} s; training "
            "and validation need at least one each. Add audio, or lower data.clip_seconds."
        )
    wanted = max(1, round(config.validation * sum(sizes)))
    order = sorted(range(len(usable)), key=lambda index: fingerprint(seed, ascii(_name(usable[index].path, root))))
    having = [index for index in order if full[index]]
    if len(having) == 1:
        kept = full[having[0]] - min(wanted, full[having[0]] - 1)
        return [
            [TRAIN] * kept + [VALIDATION] * (size - kept) if number else [TRAIN] * size
            for size, number in zip(sizes, full, strict=True)
        ]
    chosen: set[int] = set()
    taken, left = 0, sum(full)
    for index in order:
        if taken < wanted and taken + sizes[index] <= 2 * wanted and full[index] < left:
            chosen.add(index)
            taken, left = taken + sizes[index], left - full[index]
    if left == sum(full):
        chosen.add(min(having, key=full.__getitem__))
    return [[VALIDATION if index in chosen else TRAIN] * size for index, size in enumerate(sizes)]


def _prompts(clips: list[Clip]) -> list[Prompt]:
    """One caption each of validation clips, or of training clips where those have none, without repeats."""
    for split in (VALIDATION, TRAIN):
        texts = dict.fromkeys(clip.captions[0] for clip in clips if clip.split == split and clip.captions)
        if texts:
            return [Prompt(text) for text in list(texts)[:PROMPTS]]
    return []


def _info(clips: list[Clip], usable: list[_Found], skipped: list[Skipped], config: DataConfig) -> dict[str, Any]:
    return {
        "clips": len(clips),
        "splits": dict(Counter(clip.split for clip in clips)),
        "held_out_combinations": [],
        "skipped": len(skipped),
        "skipped_reasons": dict(Counter(row.reason for row in skipped)),
        # Training clips of full length are what the words are learnt from.
        "captions": any(clip.captions for clip in clips if clip.split == TRAIN and clip.seconds == config.clip_seconds),
        "captioned": sum(bool(clip.captions) for clip in clips),
        "files": len(usable),
        "seconds": sum(clip.seconds for clip in clips),
    }
