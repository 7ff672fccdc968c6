"""Captions for the built-in corpus: what a clip sounds like, in varied words.

A template is a sentence with slots; each slot takes one of several phrasings of an attribute's value. The templates of
HELD_OUT_TEMPLATES are never used in training captions, only in evaluation prompts, though all their words are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

# {instrument} is a noun without its article; {register} and {tempo} are adjectives, {notes} and {pace} noun phrases;
# {drums} is an adverbial; {mood} is an adjective.
PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "instrument": {
        "plucked string": ("plucked string", "guitar-like plucked string", "harp-like string", "guitar", "harp"),
        "flute": ("flute", "breathy flute", "flute-like woodwind", "soft wooden flute", "whistling flute"),
        "bell": ("bell", "ringing bell", "metal chime", "bell-like chime", "ringing chime"),
        "bass": ("synth bass", "bass synth", "bass", "electronic bass", "round bass synthesizer"),
        "brass": ("brass horn", "trumpet", "brassy trumpet", "horn section", "swelling brass section"),
    },
    "register": {
        "low": ("low", "deep", "low-pitched", "deep, low"),
        "high": ("high", "high-pitched", "high, soaring", "treble"),
    },
    "notes": {
        "low": ("low notes", "deep, low notes", "deep notes", "notes of a low register", "notes far down"),
        "high": ("high notes", "high-pitched notes", "notes of a high register", "treble notes", "notes high up"),
    },
    "tempo": {
        "slow": ("slow", "slow, unhurried", "unhurried", "leisurely"),
        "medium": ("medium-tempo", "mid-tempo", "moderate", "moderately paced"),
        "fast": ("fast", "quick", "fast, lively", "rapid"),
    },
    "pace": {
        "slow": ("a slow tempo", "a leisurely pace", "an unhurried tempo", "a slow, calm pace"),
        "medium": ("a medium tempo", "a moderate pace", "a walking pace", "a moderate tempo"),
        "fast": ("a fast tempo", "a quick pace", "a rapid tempo", "a fast, lively pace"),
    },
    "drums": {
        "drums": ("with drums", "over a drum beat", "with a drum kit", "backed by drums", "with drums and percussion"),
        "no drums": (
            "without drums", "with no drums", "without any percussion", "with no percussion", "with no drum beat",
        ),
    },
    "mood": {
        "major": ("major", "happy", "bright, major", "cheerful", "happy, major-key"),
        "minor": ("minor", "sad", "sad, minor", "melancholy", "dark, minor-key"),
    },
}  # fmt: skip

SOURCE = {"notes": "register", "pace": "tempo", "mood": "mode"}
"""The attribute behind a slot, where the names differ."""

TEMPLATES = (
    "a {tempo} {register} {instrument} melody {drums}",
    "{tempo} music: a {instrument} playing {notes}, {drums}",
    "a {instrument} plays {notes} at {pace}, {drums}",
    "a {register} {instrument} at {pace} {drums}",
    "{notes} on a {instrument}, {drums}, at {pace}",
    "a {tempo} {instrument} tune in {notes} {drums}",
    "{instrument}, {register}, {tempo}, {drums}",
    "{register} {instrument}, {pace}, {drums}",
    "a melody of {notes} on a {instrument}, {tempo}, {drums}",
    "a {instrument} solo {drums}, {register}, {tempo}",
    "{drums}, a {instrument} plays a {tempo} melody in {notes}",
    "at {pace}, a {register} {instrument} plays {drums}",
    "a {tempo} piece for a {instrument} {drums} that keeps to {notes}",
    "a {register}, {tempo} {instrument} {drums}",
    "this is a {tempo} tune, the {notes} of a {instrument} {drums}",
    "music at {pace} {drums}: {instrument}, {notes}",
    "someone plays a {register} {instrument} at {pace}, {drums}",
    "a {instrument} {drums}; the melody is {tempo}, the notes are {register}",
    "a {mood} {tempo} melody on a {register} {instrument} {drums}",
    "a {mood} tune: a {instrument} plays {notes} at {pace} {drums}",
    "a {mood} {instrument} piece {drums}, {register}, at {pace}",
    "{mood} music at {pace}, {notes} on a {instrument}, {drums}",
    "{mood}, {tempo} {register} {instrument} {drums}",
    "in a {mood} mood, a {register} {instrument} plays at {pace} {drums}",
    "a {tempo} {mood} melody {drums}, played by a {register} {instrument}",
    "{drums}, {mood} {notes} of a {instrument} at {pace}",
)
"""Name instrument, register, tempo and drums, some also the mode."""

SHORT_TEMPLATES = (
    "a {instrument} {drums}",
    "a {register} {instrument}",
    "a {tempo} {instrument} melody",
    "a {instrument} at {pace}",
    "{notes} on a {instrument}",
    "a {tempo} {register} melody",
    "{notes} at {pace}",
    "a {tempo} tune {drums}",
    "music at {pace}, {drums}",
    "a {register} melody {drums}",
    "{notes}, {drums}",
    "a {mood} {instrument}",
    "a {mood} melody {drums}",
    "{mood} music at {pace}",
    "a {tempo} {instrument} {drums}",
    "a {register} {instrument} {drums}",
    "a {register} {instrument} at {pace}",
    "{notes} at {pace}, {drums}",
    "a {mood} {tempo} {instrument} tune",
    "a {mood} tune in {notes} {drums}",
)
"""Name two or three attributes."""

HELD_OUT_TEMPLATES = (
    "a {instrument} melody at {pace}, {notes}, {drums}",
    "{tempo} {instrument} music {drums}, in {notes}",
    "the {register} melody of a {tempo} {instrument}, {drums}",
    "a tune at {pace} {drums}, played by a {register} {instrument}",
    "{notes}, {pace}, {instrument}, {drums}",
    "{drums}: someone plays {notes} on a {tempo} {instrument}",
    "a {tempo} solo for a {register} {instrument} {drums}",
    "a piece of {register}, {tempo} music for a {instrument}, {drums}",
)
"""Name instrument, register, tempo and drums in ways no training caption does."""

SLOT = re.compile(r"{(\w+)}")
ARTICLE = re.compile(r"\ba (?=[aeiou])")


def fill(template: str, attributes: Mapping[str, str], random: np.random.Generator) -> str:
    """`template` with every slot phrased at random, and "a" made "an" before a vowel."""

    def phrase(slot: re.Match[str]) -> str:
        name = slot[1]
        return str(random.choice(PHRASES[name][attributes[SOURCE.get(name, name)]]))

    return ARTICLE.sub("an ", SLOT.sub(phrase, template))


def captions(attributes: Mapping[str, str], random: np.random.Generator) -> list[str]:
    """Four captions of a clip: three that name instrument, register, tempo and drums, and one short one."""
    templates = _choose(TEMPLATES, 3, random) + _choose(SHORT_TEMPLATES, 1, random)
    return [fill(template, attributes, random) for template in templates]


def _choose(templates: Sequence[str], number: int, random: np.random.Generator) -> list[str]:
    return [templates[index] for index in random.choice(len(templates), number, replace=False)]
