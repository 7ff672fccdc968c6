from __future__ import annotations

import pytest

from data.tag_captions import collected, tag_captions


def test_captions_say_what_is_known_and_never_who_plays() -> None:
    columns = {"genre": "jazz", "Mood": "calm", "bpm": 64, "key": "A minor", "year": 1987, "artist": "Somebody"}
    tags = collected(["piano, double bass", "instrument---trumpet"], columns)
    captions = [text for name in map(str, range(60)) for text in tag_captions(tags, 3, 0, name)]
    assert len(captions) == 180
    text = " ".join(captions)
    for word in ("jazz", "calm", "slow", "64 BPM", "A minor", "1980s", "piano", "trumpet"):
        assert word in text
    assert "Somebody" not in text
    assert "{" not in text
    assert len(set(captions)) > 100


def test_captions_are_the_same_for_a_seed_and_a_name() -> None:
    tags = collected({"genre": ["ambient", "drone"], "artist": "x", "instruments": "organ"}, {})
    assert tags == {"genre": ("ambient", "drone"), "instrument": ("organ",)}
    assert tag_captions(tags, 3, 0, "a") == tag_captions(tags, 3, 0, "a")
    assert len({tag_captions(tags, 3, seed, name) for seed in (0, 1) for name in "abc"}) > 3
    assert "an ambient" in " ".join(text for n in range(40) for text in tag_captions(tags, 3, 0, str(n)))


def test_a_plain_list_of_tags() -> None:
    captions = tag_captions(collected("rock, loud;guitar", {}), 3, 0, "a")
    assert len(captions) == len(set(captions)) == 3
    assert all("rock" in text and "loud" in text and "guitar" in text for text in captions)


def test_none_of_nothing() -> None:
    assert tag_captions({}, 3, 0, "a") == ()
    assert tag_captions({"genre": ("rock",)}, 0, 0, "a") == ()
    assert tag_captions(collected(None, {"genre": None, "title": "x"}), 3, 0, "a") == ()
    with pytest.raises(ValueError, match="tags must be text"):
        collected(True, {})
