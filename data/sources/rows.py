"""A row that describes audio, whichever source it comes from: a manifest, a sample's JSON, the columns of a shard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from data.caption_files import CAPTION_COLUMNS, clean
from data.corpus import TEST, TRAIN, VALIDATION
from data.sources.base import Value
from data.tables import NOT_UTF8, column
from data.tag_captions import collected

SPLITS = {
    "train": TRAIN, "training": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION,
    "dev": VALIDATION, "test": TEST,
}  # fmt: skip
TEXT_LIMIT = 1 << 16
"""Characters of a column's text; what is longer is no column but a document."""


def description(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of its audio, as the fields of Item: captions, tags, start, end, split, id, and as columns all
    that is left. Raises ValueError, in words, for a value that is none."""
    rest = {name.strip(): value for name, value in row.items() if isinstance(name, str) and name.strip()}

    def take(*names: str) -> Any:
        found = column(rest, names)
        return None if found is None else rest.pop(found)

    captions, given = _captions(take(*CAPTION_COLUMNS)), take("tags")
    start, end = _seconds("start", take("start")), _seconds("end", take("end"))
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"its end, {end:g} s, is not after its start, {start or 0.0:g} s")
    split, own = _split(take("split")), _id(take("id"))
    columns = {name: _value(name, value) for name, value in rest.items()}
    return {
        "captions": captions,
        "tags": collected(_listed(given), {**rest, **columns}),
        "start": start or 0.0,
        "end": end,
        "split": split,
        "id": own,
        "columns": {**({"id": own} if own is not None else {}), **columns},
    }


def numbered(rows: list[dict[str, Value]]) -> None:
    """Makes numbers of the columns of a text table whose every value is one, in all `rows`."""
    for name in {name for row in rows for name in row if name != "id"}:
        texts = [value for row in rows if (value := row.get(name)) is not None]
        for kind in (int, float):
            try:
                values = {text: kind(text) for text in texts if isinstance(text, str)}
            except ValueError:
                continue
            if all(map(math.isfinite, values.values())):
                for row in rows:
                    if isinstance(text := row.get(name), str):
                        row[name] = values[text]
            break


def _captions(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("its caption is neither text nor a list of texts")
    return tuple(dict.fromkeys(text for part in texts if (text := clean(_text("caption", part)))))


def _listed(value: Any) -> Any:
    """A list or mapping that stands in a CSV as JSON."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value or None


def _seconds(name: str, value: Any) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"its {name} is {str(value)[:40]!r}, not a number of seconds")
    if seconds < 0:
        raise ValueError(f"its {name}, {seconds:g} s, is negative")
    return seconds


def _split(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or value.strip().lower() not in SPLITS:
        raise ValueError(f"its split is {str(value)[:40]!r}, not train, validation or test")
    return SPLITS[value.strip().lower()]


def _id(value: Any) -> str | None:
    return None if value is None or value == "" else _text("id", str(value))


def _value(name: str, value: Any) -> Value:
    """A column's value: what is neither a number nor text as JSON, nothing as None."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    text = _text(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text or None


def _text(name: str, text: str) -> str:
    if NOT_UTF8.search(text):
        raise ValueError(f"its {name} is not UTF-8 text")
    if len(text) > TEXT_LIMIT:
        raise ValueError(f"its {name} has {len(text):,} characters")
    return text
