"""Plain DeepSpeed configurations, one file a ZeRO choice. Batch, precision and clipping come from the recipe."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ds_configs.schema import REFUSED, DeepSpeedFile, keys_of
from model.errors import UserError, nearest

UNKNOWN = "extra_forbidden"
"""pydantic's name for it; what seems to be missing is often there by a wrong name."""


def names() -> list[str]:
    """The configurations that come with Stretto."""
    files = (Path(file.name) for file in resources.files(__package__).iterdir())
    return sorted(file.stem for file in files if file.suffix == ".json")


def read(name_or_path: str) -> dict[str, Any]:
    """The DeepSpeed configuration of that name, or in that file, without what it leaves open ("auto" and null).

    Raises UserError where there is none, it does not read as JSON, a key is unknown, twice there or something that
    Stretto does itself, or a value is not what DeepSpeed takes.
    """
    if name_or_path in names():
        text = (resources.files(__package__) / f"{name_or_path}.json").read_text()
    elif Path(name_or_path).is_file():
        text = Path(name_or_path).read_text()
    else:
        hint = nearest(name_or_path, names()) or f" Choose one of {', '.join(names())}, or name a JSON file."
        raise UserError(f"There is no DeepSpeed configuration {name_or_path!r}.{hint}")
    try:
        given = json.loads(text, object_pairs_hook=_once)
        if not isinstance(given, dict):
            raise ValueError("it must be an object, {...}")
        settings = DeepSpeedFile.model_validate(_decided(given)).model_dump(exclude_unset=True)
    except json.JSONDecodeError as error:
        raise UserError(f"{name_or_path} does not read as JSON: {error}.") from None
    except ValidationError as error:
        problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != UNKNOWN)
        raise UserError(f"{name_or_path}: {_line(problems[0])}") from None
    except ValueError as error:
        raise UserError(f"{name_or_path}: {error}.") from None
    return settings


def zero_stage(name_or_path: str) -> int:
    """The ZeRO stage (0 to 3) that a configuration chooses."""
    return read(name_or_path)["zero_optimization"]["stage"]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Python and DeepSpeed would take the last of two keys of one name."""
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{twice[0]} is there twice: remove one")
    return dict(pairs)


def _decided(section: dict[str, Any], path: str = "") -> dict[str, Any]:
    """`section` without what it leaves open. Raises ValueError where it asks for what Stretto does itself."""
    kept = {}
    for key, value in section.items():
        if value is None or value == "auto":
            continue
        if reason := REFUSED.get(path + key):
            if _asks(value):
                raise ValueError(f"{path}{key}: {reason}")
            continue
        kept[key] = _decided(value, f"{path}{key}.") if isinstance(value, dict) else value
    return kept


def _asks(value: Any) -> bool:
    """Whether a section or switch that files often carry along is on."""
    on = value.get("enabled", bool(value)) if isinstance(value, dict) else value
    return on not in (False, "auto")


def _line(problem: Any) -> str:
    """What is wrong, in one plain line, from pydantic's account of it."""
    location, last = ".".join(map(str, problem["loc"])), str(problem["loc"][-1])
    if problem["type"] == UNKNOWN:
        valid = keys_of(DeepSpeedFile, problem["loc"][:-1])
        hint = nearest(last, valid) or f" It can be {', '.join(valid)}."
        return f"{location} is not a key of DeepSpeed.{hint}"
    if problem["type"] == "missing":
        return f"{location} is missing."
    if problem["type"] == "model_type":
        return f"{location} is {problem['input']!r}: it must be an object, {{...}}."
    if problem["type"] == "value_error":
        return f"{location}: {problem['msg'].removeprefix('Value error, ')}."
    return f"{location} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."
