from __future__ import annotations

from typing import Any

import pytest

from data.config import DataConfig
from data.splits import Member, splits
from model.errors import UserError


def split(members: list[Member], seed: int = 0, **config: Any) -> list[list[str]]:
    return splits(members, DataConfig(audio="music", **{"validation": 0.2, **config}), seed)


def songs(count: int, clips: int = 1) -> list[Member]:
    return [Member(f"song {number}", None, clips, clips) for number in range(count)]


def test_nothing_that_is_added_moves_an_old_group() -> None:
    before, after = split(songs(200), test=0.1), split([*songs(1000)[::-1]], test=0.1)[::-1]
    assert after[:200] == before
    counts = {name: sum(row == [name] for row in after) for name in ("train", "validation", "test")}
    assert counts["validation"] == pytest.approx(200, abs=40)
    assert counts["test"] == pytest.approx(100, abs=30)
    assert split(songs(200), seed=1, test=0.1) != before


def test_shares_that_grow_take_groups_from_training_alone() -> None:
    small, large = split(songs(300), validation=0.05, test=0.05), split(songs(300), validation=0.2, test=0.1)
    assert small != large
    assert all(old in (["train"], new) for old, new in zip(small, large, strict=True))


def test_a_group_is_never_divided() -> None:
    members = [Member(f"artist {number % 7}", None, 3, 3) for number in range(50)]
    found: dict[str, set[str]] = {}
    for member, row in zip(members, split(members), strict=True):
        assert len(row) == 3
        found.setdefault(member.group, set()).update(row)
    assert all(len(names) == 1 for names in found.values())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("share", [0.01, 0.99])
def test_training_and_validation_both_have_clips(count: int, share: float, seed: int) -> None:
    names = {row[0] for row in split(songs(count, 3), seed, validation=share)}
    assert names == {"train", "validation"}


def test_what_the_source_says_wins_and_holds_for_its_group() -> None:
    members = [
        Member("a", "test", 2, 2), Member("a", None, 2, 2), Member("b", "validation", 1, 1), Member("c", "train", 1, 1),
    ]  # fmt: skip
    assert split(members) == [["test"] * 2, ["test"] * 2, ["validation"], ["train"]]


def test_one_group_is_cut_at_its_end() -> None:
    assert split([Member("a", None, 3, 2), Member("a", None, 7, 7)]) == [
        ["train"] * 3,
        ["train"] * 5 + ["validation"] * 2,
    ]
    given = [Member("a", "train", 3, 3), Member("b", None, 3, 3)]
    assert split(given) == [["train"] * 3, ["validation"] * 3]
    given = [Member("a", "train", 3, 3)]
    with pytest.raises(UserError, match="gives no clip of 5 s whose split it does not say itself"):
        split(given)
