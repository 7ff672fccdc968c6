"""Plain DeepSpeed configurations, one file a ZeRO choice. Batch, precision and clipping come from the recipe."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from model.errors import UserError


def names() -> list[str]:
    """The configurations that come with Stretto."""
    files = (Path(file.name) for file in resources.files(__package__).iterdir())
    return sorted(file.stem for file in files if file.suffix == ".json")


def read(name_or_path: str) -> dict[str, Any]:
    """The DeepSpeed configuration of that name, or in that file.

    Raises UserError where there is none, it is not a JSON object, or it has no `zero_optimization` section.
    """
    if name_or_path in names():
        text = (resources.files(__package__) / f"{name_or_path}.json").read_text()
    elif Path(name_or_path).is_file():
        text = Path(name_or_path).read_text()
    else:
        near = difflib.get_close_matches(name_or_path, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names())}, or name a JSON file."
        raise UserError(f"There is no DeepSpeed configuration {name_or_path!r}: {hint}")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name_or_path} does not read as JSON: {error}.") from None
    if not isinstance(config, dict) or "stage" not in config.get("zero_optimization", {}):
        raise UserError(f'{name_or_path} needs a "zero_optimization" section with a "stage".')
    return config


def zero_stage(name_or_path: str) -> int:
    """The ZeRO stage (0 to 3) that a configuration chooses."""
    return read(name_or_path)["zero_optimization"]["stage"]
