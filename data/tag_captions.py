"""Captions made of tags, for audio that has none: templates filled with genre, mood, instruments, tempo, key and time.

Names of artists and titles are never used: a model should not learn to imitate either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from model.artifact import fingerprint

Tags = dict[str, tuple[str, ...]]
"""The values of each known kind of tag; "tags" are those of unknown kind."""

KINDS = {
    "genre": "genre", "genres": "genre", "style": "genre", "mood": "mood", "moods": "mood", "mood/theme": "mood",
    "instrument": "instrument", "instruments": "instrument", "tempo": "tempo", "bpm": "tempo", "key": "key",
    "year": "year", "decade": "year", "tags": "tags", "tag": "tags",
}  # fmt: skip
PREFIXED = re.compile(r"\s*([a-z/]+)\s*(?:---|:|=)\s*(.+)", re.IGNORECASE)
SUBJECTS = ("{} music", "a {} piece", "a {} track", "a piece of {} music", "this is {} music")
WITH_INSTRUMENTS = ("with {}", "featuring {}", "played on {}", "with the sound of {}")
PACES = (
    (76, ("at a slow tempo", "played slowly", "at an unhurried pace")),
    (120, ("at a medium tempo", "at a moderate pace", "at a walking pace")),
    (np.inf, ("at a fast tempo", "played fast", "at a lively pace")),
)
"""Up to so many beats a minute, and how to say it."""
LISTS = ("{}", "music: {}", "a piece of music, {}", "{} music", "a track with the tags {}")
MOST_LISTED = 5
KEPT = 0.75
"""Probability that a caption says each thing that is known."""
TRIES = 8
ARTICLE = re.compile(r"\ba (?=[aeiou])", re.IGNORECASE)


def collected(given: Any, columns: Mapping[str, Any]) -> Tags:
    """The tags of an item: `given` as text with commas, a list or a mapping by kind, and the columns of known kinds.

    Raises ValueError where `given` is nothing of these.
    """
    found: dict[str, list[str]] = {}

    def add(kind: str, value: Any) -> None:
        for text in _texts(value):
            prefixed = PREFIXED.fullmatch(text)
            own = KINDS.get(prefixed[1].lower()) if prefixed else None
            name, text = (own, prefixed[2]) if prefixed and own else (kind, text)
            found.setdefault(name, []).append(text)

    for name, value in columns.items():
        if (kind := KINDS.get(name.lower())) and kind != "tags" and value not in (None, ""):
            add(kind, value)
    if isinstance(given, Mapping):
        for name, value in given.items():
            if kind := KINDS.get(str(name).lower()):
                add(kind, value)
    elif given is not None:
        add("tags", given)
    return {kind: tuple(dict.fromkeys(texts)) for kind, texts in found.items()}


def tag_captions(tags: Tags, count: int, seed: int, name: str) -> tuple[str, ...]:
    """At most `count` different captions for the item called `name`; the same for the same seed, name and tags."""
    random = np.random.default_rng(int(fingerprint("tag captions", seed, ascii(name)), 16))
    made: dict[str, None] = {}
    for _ in range(TRIES * count if any(tags.values()) else 0):
        made[_caption(tags, random)] = None
        if len(made) == count:
            break
    return tuple(made)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        parts = re.split(r"[,;|]", value)
    elif isinstance(value, (list, tuple)):
        parts = [text for part in value for text in ([part] if isinstance(part, str) else _texts(part))]
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value):
        parts = [f"{value:g}"]
    else:
        raise ValueError("tags must be text, a list of texts, or texts by kind")
    return [text for part in parts if (text := " ".join(part.replace("_", " ").split()))]


def _caption(tags: Tags, random: np.random.Generator) -> str:
    kept = {kind: texts for kind, texts in tags.items() if random.random() < KEPT} or dict(tags)
    if set(kept) == {"tags"}:
        return str(random.choice(LISTS)).format(_some(kept["tags"], random, last=", "))
    words = [str(random.choice(kept[kind])) for kind in ("mood", "genre") if kind in kept]
    subject = str(random.choice(SUBJECTS)).format(" ".join(words)) if words else "music"
    said = []
    if "instrument" in kept:
        said.append(str(random.choice(WITH_INSTRUMENTS)).format(_some(kept["instrument"], random)))
    if "tempo" in kept:
        said.append(_tempo(kept["tempo"][0], random))
    if "key" in kept:
        said.append(f"in {kept['key'][0]}")
    if "year" in kept:
        said.append(_time(kept["year"][0]))
    order = [said[index] for index in random.permutation(len(said))]
    caption = ", ".join([" ".join([subject, *order[:1]]), *order[1:]])
    if "tags" in kept:
        caption += f": {_some(kept['tags'], random, last=', ')}"
    return ARTICLE.sub("an ", caption)


def _some(texts: tuple[str, ...], random: np.random.Generator, last: str = " and ") -> str:
    """A list of some of them, in random order."""
    chosen = [texts[index] for index in random.permutation(len(texts))[:MOST_LISTED]]
    return last.join([", ".join(chosen[:-1]), chosen[-1]]) if len(chosen) > 1 else chosen[0]


def _tempo(text: str, random: np.random.Generator) -> str:
    number = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:bpm)?", text, re.IGNORECASE)
    if not number:
        return f"at a {text} tempo"
    beats = float(number[1])
    ways = next(ways for most, ways in PACES if beats <= most)
    return str(random.choice([*ways, f"at {beats:.0f} BPM"]))


def _time(text: str) -> str:
    year = re.fullmatch(r"(\d{3})\d(?:s|\.0)?", text)
    return f"from the {year[1]}0s" if year else f"from {text}"
