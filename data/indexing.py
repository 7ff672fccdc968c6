"""A user's own audio: a source → a corpus of clips, whatever state the audio is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.corpus import SKIPPED, TEST, TRAIN, VALIDATION, Clip, Prompt, write_clips, write_jsonl, write_prompts
from data.cutting import CLIP_FAULTS, Found, cut_part, lost_part
from data.pool import over_processes
from data.progress import Progress
from data.sources import open_source
from data.sources.base import Skipped, Source
from data.splits import Member, splits
from data.tag_captions import tag_captions
from model.artifact import fingerprint
from model.errors import UserError

PROMPTS = 64
DUPLICATE = "duplicate"


def index_audio(folder: Path, config: DataConfig, seed: int, progress: Progress) -> dict[str, Any]:
    """Fills `folder` with the clip list of the user's audio in `config.audio`, prompts, and what was skipped and why.

    Every item of the source is decoded once and cut into clips of `config.clip_seconds` that do not overlap. A last
    part of at least 90 % of a clip is one as well, padded with silence, or with `config.shortest_seconds` one of at
    least that length, which keeps its own; a shorter one is left out. The audio stays where it is. A clip's id depends
    on its item and start alone. Splits are made by data.splits.

    Returns what the artifact's manifest says of it. Raises UserError when the source or the captions file cannot be
    used or nothing is left.
    """
    source = open_source(config)
    found, skipped = _inspect(source, config, progress)
    if config.duplicates == "skip":
        _drop_repeats(found)
    skipped += [row for one in found for row in one.skipped()]
    usable = [one for one in found if one.clips]
    if not usable:
        raise UserError(_nothing_left(source.place, config, skipped))
    split_of = splits(_members(usable, config), config, seed)
    clips = [clip for one, own in zip(usable, split_of, strict=True) for clip in _clips(one, own, config, seed)]
    write_clips(folder, clips)
    write_jsonl(folder / SKIPPED, (asdict(row) for row in skipped))
    write_prompts(folder, _prompts(clips))
    return _info(clips, found, skipped, config)


def _inspect(source: Source, config: DataConfig, progress: Progress) -> tuple[list[Found], list[Skipped]]:
    """What each item holds, with the first of those that are given twice, and what is no item."""
    parts = source.parts()
    skipped, found, keys = source.skipped(), [], set()
    clips = faults = 0
    tasks = [(part, config) for part in parts]
    done = over_processes(cut_part, tasks, source.parts_a_process, min(4, source.parts_a_process), lost_part)
    for number, results in enumerate(done, start=1):
        for one in results:
            if isinstance(one, Skipped):
                skipped.append(one)
            elif one.item.key in keys:
                what = "id" if one.item.id is not None else "row"
                skipped.append(Skipped(one.item.name, f"duplicate {what}", f"{one.item.key} stands there before"))
            else:
                keys.add(one.item.key)
                found.append(one)
                clips, faults = clips + len(one.clips), faults + bool(one.faults)
        progress.update(number, len(parts), "reading audio", clips=clips, left_out=faults + len(skipped))
    return found, skipped


def _drop_repeats(found: list[Found]) -> None:
    """Takes clips whose samples came before, in order, out of `found`."""
    first: dict[bytes, tuple[str, float]] = {}
    for one in found:
        kept = []
        for cut in one.clips:
            here = (one.item.name, cut.start)
            name, start = first.setdefault(cut.digest, here)
            if (name, start) == here:
                kept.append(cut)
            else:
                one.faults.append((DUPLICATE, f"at {cut.start:g} s the same samples as {name} at {start:g} s"))
        one.clips = kept


def _nothing_left(place: str, config: DataConfig, skipped: list[Skipped]) -> str:
    if not skipped:
        return f"data.audio: {place} holds no audio files."
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(row.reason for row in skipped).most_common())
    first = skipped[0]
    return (
        f"data.audio: no file in {place} can be used ({reasons}), for example {first.file}: {first.detail}. "
        f"Clips last data.clip_seconds={config.clip_seconds:g} s and reach data.silence_db={config.silence_db:g} dB."
    )


def _members(usable: list[Found], config: DataConfig) -> list[Member]:
    """What the split is made of: groups are source files, or what `config.split_by` says where an item has it.

    Raises UserError where no item has it.
    """
    key = config.split_by
    if key is not None and all(one.item.columns.get(key) is None for one in usable):
        known = sorted({name for one in usable for name in one.item.columns})
        have = f"The columns are {', '.join(known)}." if known else "There are no columns."
        raise UserError(f"data.split_by is {key}: nothing in {config.audio} has such a column. {have}")
    members = []
    for one in usable:
        value = one.item.columns.get(key) if key else None
        group = one.item.name if value is None else f"{key} {value}"
        full = sum(cut.seconds == config.clip_seconds for cut in one.clips)
        members.append(Member(group, one.item.split, len(one.clips), full))
    return members


def _clips(one: Found, split_of: Sequence[str], config: DataConfig, seed: int) -> Iterator[Clip]:
    item = one.item
    captions = item.captions or tag_captions(item.tags, config.tag_captions, seed, item.key)
    for cut, split in zip(one.clips, split_of, strict=True):
        # Not a running number, so that a clip keeps its id when others are added.
        name = f"clip-{fingerprint(ascii(item.id or item.name), cut.start)}"
        yield Clip(
            name, item.path, cut.start, cut.seconds, captions, split, None, item.columns, cut.gain, config.channels
        )


def _prompts(clips: list[Clip]) -> list[Prompt]:
    """One caption each of test clips, without repeats; of validation or training clips where those have none."""
    for split in (TEST, VALIDATION, TRAIN):
        texts = dict.fromkeys(clip.captions[0] for clip in clips if clip.split == split and clip.captions)
        if texts:
            return [Prompt(text) for text in list(texts)[:PROMPTS]]
    return []


def _info(clips: list[Clip], found: list[Found], skipped: list[Skipped], config: DataConfig) -> dict[str, Any]:
    faults = Counter(reason for one in found for reason, _ in one.faults)
    return {
        "clips": len(clips),
        "splits": dict(Counter(clip.split for clip in clips)),
        "held_out_combinations": [],
        "skipped": len(skipped),
        "skipped_reasons": dict(Counter(row.reason for row in skipped)),
        "skipped_clips": {reason: faults[reason] for reason in (*CLIP_FAULTS, DUPLICATE) if faults[reason]},
        # Training clips of full length are what the words are learnt from.
        "captions": any(clip.captions for clip in clips if clip.split == TRAIN and clip.seconds == config.clip_seconds),
        "captioned": sum(bool(clip.captions) for clip in clips),
        "columns": sorted({name for one in found for name in one.item.columns}),
        "files": sum(bool(one.clips) for one in found),
        "seconds": sum(clip.seconds for clip in clips),
    }
