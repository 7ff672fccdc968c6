"""Captions: templates say what they claim, phrasings do not contradict each other, evaluation phrasings are new."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from data.captions import HELD_OUT_TEMPLATES, PHRASES, SHORT_TEMPLATES, SLOT, SOURCE, TEMPLATES, captions, fill
from data.synthesis import ATTRIBUTES

BASE = {"instrument": "bell", "register": "low", "tempo": "slow", "drums": "drums", "mode": "major"}
JUDGED = {"instrument", "register", "tempo", "drums"}


def named(template: str) -> list[str]:
    """The attributes a template speaks of."""
    return [SOURCE.get(slot, slot) for slot in SLOT.findall(template)]


def test_every_slot_has_phrases_for_every_value() -> None:
    for slot, phrases in PHRASES.items():
        assert tuple(phrases) == ATTRIBUTES[SOURCE.get(slot, slot)]
        assert all(len(set(choices)) == len(choices) >= 4 for choices in phrases.values())


@pytest.mark.parametrize("slot", PHRASES)
def test_no_phrase_stands_for_two_values(slot: str) -> None:
    for one, other in combinations(PHRASES[slot].values(), 2):
        assert not set(one) & set(other)


def test_templates_name_what_they_promise_and_nothing_twice() -> None:
    for template in (*TEMPLATES, *HELD_OUT_TEMPLATES):
        assert set(named(template)) >= JUDGED
    for template in (*TEMPLATES, *SHORT_TEMPLATES, *HELD_OUT_TEMPLATES):
        assert len(set(named(template))) == len(named(template)) >= 2


def test_evaluation_templates_are_new_but_their_words_are_not() -> None:
    def words(templates: tuple[str, ...]) -> set[str]:
        return {word.strip(",:;") for template in templates for word in SLOT.sub("", template).split()} - {""}

    assert not set(HELD_OUT_TEMPLATES) & {*TEMPLATES, *SHORT_TEMPLATES}
    assert words(HELD_OUT_TEMPLATES) <= words((*TEMPLATES, *SHORT_TEMPLATES))


def test_captions_are_varied_and_reproducible() -> None:
    found = captions(BASE, np.random.default_rng(0))
    assert found == captions(BASE, np.random.default_rng(0))
    assert len(set(found)) == 4
    random = np.random.default_rng(1)
    assert len({text for _ in range(50) for text in captions(BASE, random)}) > 150


def test_captions_read_as_sentences() -> None:
    random = np.random.default_rng(2)
    for template in (*TEMPLATES, *SHORT_TEMPLATES, *HELD_OUT_TEMPLATES):
        for _ in range(20):
            text = fill(template, BASE, random)
            assert "{" not in text
            assert "  " not in text
            assert not any(f" a {vowel}" in f" {text}" for vowel in "aeiou")


def test_a_becomes_an_before_a_vowel() -> None:
    unhurried = {**BASE, "tempo": "slow"}
    texts = {fill("a {tempo} tune", unhurried, np.random.default_rng(seed)) for seed in range(40)}
    assert {"a slow tune", "an unhurried tune"} <= texts
