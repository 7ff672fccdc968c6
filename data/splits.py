"""Which clips are trained on: splits by groups (source files, artists), which stay where they are as a corpus grows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data.config import DataConfig
from data.corpus import TEST, TRAIN, VALIDATION
from model.artifact import fingerprint
from model.errors import UserError

OTHER = {TRAIN: VALIDATION, VALIDATION: TRAIN}


@dataclass(frozen=True)
class Member:
    """An item as the split sees it: the group it goes with, the split its source gives it, its clips, and how many of
    these, the first, have full length."""

    group: str
    given: str | None
    clips: int
    full: int


def splits(members: Sequence[Member], config: DataConfig, seed: int) -> list[list[str]]:
    """For each member the split of each of its clips. Whole groups go to one split.

    What the source gives wins, and holds for those of the group that it gives none. Every other group has a place in
    [0, 1), drawn from `seed` and its name alone: below `config.validation` it is validation, in the last `config.test`
    it is test, else training. So nothing that is added moves an old group, and larger shares take from training alone.

    Training and validation need a clip of full length each. Where the draw leaves one without, as happens with few
    groups, the group of the lowest place goes to validation, or that of the highest to training; that choice alone can
    change as a corpus grows. Where one group is all there is, its last clips are validation.

    Raises UserError where that cannot be.
    """
    chosen = _drawn(members, config, seed)
    for split, last in ((TRAIN, -1), (VALIDATION, 0)):
        held = _full_clips(members, chosen)
        if held[split]:
            continue
        movable = _movable(members, chosen, split, seed)
        if not movable:
            return _cut(members, chosen, config)
        chosen[movable[last]] = split
    return [[member.given or chosen[member.group]] * member.clips for member in members]


def _drawn(members: Sequence[Member], config: DataConfig, seed: int) -> dict[str, str]:
    given = {member.group: member.given for member in reversed(members) if member.given}
    chosen = {}
    for group in {member.group for member in members}:
        place = _place(group, seed)
        drawn = VALIDATION if place < config.validation else TEST if place >= 1 - config.test else TRAIN
        chosen[group] = given.get(group, drawn)
    return chosen


def _place(group: str, seed: int) -> float:
    return int(fingerprint(seed, ascii(group)), 16) / 16**16


def _full_clips(members: Sequence[Member], chosen: dict[str, str]) -> Counter[str]:
    """Clips of full length in each split."""
    held: Counter[str] = Counter()
    for member in members:
        held[member.given or chosen[member.group]] += member.full
    return held


def _movable(members: Sequence[Member], chosen: dict[str, str], split: str, seed: int) -> list[str]:
    """The groups that can go to `split`, by place: of those that the source leaves free and that have clips of full
    length, the ones without which the other split has some as well. One with most of the clips is left where it is,
    where there is another: a single long file is for training.
    """
    held, other = _full_clips(members, chosen), OTHER[split]
    fixed = {member.group for member in members if member.given}
    full: Counter[str] = Counter()
    for member in members:
        if member.group not in fixed:
            full[member.group] += member.full
    left = {group: held[other] - clips * (chosen[group] == other) for group, clips in full.items() if clips}
    movable = [group for group, clips in left.items() if clips or not held[other]]
    small = [group for group in movable if split == TRAIN or 2 * full[group] <= sum(held.values())]
    return sorted(small or movable, key=lambda group: _place(group, seed))


def _cut(members: Sequence[Member], chosen: dict[str, str], config: DataConfig) -> list[list[str]]:
    """Splits where one group has all free clips of full length: the last of them are validation, the others training.

    Raises UserError where there are fewer than two.
    """
    fixed = {member.group for member in members if member.given}
    total = sum(member.full for member in members if member.group not in fixed)
    if total < 2:
        few = "one clip" if sum(member.full for member in members) == 1 else "no clip" if not total else "too few clips"
        left = " whose split it does not say itself" if fixed else ""
        raise UserError(
            f"data.audio: {config.audio} gives {few} of {config.clip_seconds:g} s{left}; training and validation need "
            "at least one each. Add audio, or lower data.clip_seconds."
        )
    wanted = max(1, round(config.validation * sum(member.clips for member in members)))
    kept, seen, result = total - min(wanted, total - 1), 0, []
    for member in members:
        own = member.given or chosen[member.group]
        if member.group in fixed or not member.full:
            result.append([own] * member.clips)
            continue
        result.append([TRAIN if seen + index < kept else VALIDATION for index in range(member.clips)])
        seen += member.full
    return result
