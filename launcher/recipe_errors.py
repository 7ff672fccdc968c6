"""What is wrong with a recipe, in plain lines: the key, the value and what is allowed."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, Tag, ValidationError

from data.steps.config import TAG
from model.errors import nearest

EXPECTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
}
MUST = "it must be "
UNION_TAG = re.compile(rf"constrained-\w+|int|float|bool|str|(literal|dict|list|tuple)\[.*\]|{TAG}\S+")
"""What pydantic adds to the place of a value that may be of several kinds: the kind that it is not, or that it is."""
BOUNDS = {
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
}


def plain_lines(error: ValidationError, model: type[BaseModel], own: Any, defaults: Any) -> list[str]:
    """One line a problem. `own` are the stages as the file has them, `defaults` its stage_defaults: a key that every
    stage has from there is named once, as the user wrote it."""
    found: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        location = tuple(part for part in problem["loc"] if not UNION_TAG.fullmatch(str(part)))
        shown = location
        if location[0] == "stages" and len(location) > 2 and _in(defaults, location[2:]) and not _in(own, location[1:]):
            shown = ("stage_defaults", *location[2:])
        before, must, allowed = _line(problem, _dotted(shown), model).partition(MUST)
        found.setdefault(before + must, []).append(allowed)
    return [before + _any_of(choices) for before, choices in found.items()]


def _any_of(choices: list[str]) -> str:
    """One sentence of several; words last, since the one that was meant may be named after them."""
    *first, last = sorted(dict.fromkeys(choices), key=lambda choice: choice[:1] == "'")
    return " or ".join([*(choice.rstrip(".") for choice in first), last])


def _line(problem: Any, name: str, model: type[BaseModel]) -> str:
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    *parent, last = problem["loc"] or ("",)
    if kind == "extra_forbidden":
        names = valid_names(model, parent)
        hint = nearest(str(last), names) or f" It can be {', '.join(names)}." if names else ""
        return f"{name} is not a key of a recipe.{hint}"
    if kind == "union_tag_invalid":
        allowed = context["expected_tags"].replace(TAG, "")
        wrong = context["tag"].removeprefix(TAG)
        return f"{name}.kind is {wrong!r}: it must be one of {allowed}.{_nearest_of(wrong, allowed)}"
    if kind == "union_tag_not_found":
        return f"{name}.kind is missing from the recipe."
    if kind == "missing":
        return f"{name} is missing from the recipe."
    if kind == "literal_error":
        allowed = context["expected"]
        if last == "[key]":
            name = name.removesuffix(".[key]")
            return f"{name} is not a key of a recipe: its last part can be {allowed}.{_nearest_of(value, allowed)}"
        return f"{name} is {value!r}: it must be {allowed}.{_nearest_of(value, allowed)}"
    if kind == "value_error":
        return f"{name.removesuffix('.[key]')}: {problem['msg'].removeprefix('Value error, ')}."
    if kind == "string_pattern_mismatch":
        return f"{name} is {value!r}: it may have letters, digits and '_', and after the first also '.' and '-'."
    if kind in BOUNDS:
        return f"{name} is {value!r}: it must be {BOUNDS[kind].format(**context)}."
    if kind in EXPECTED:
        return f"{name} is {_short(value)}: it must be {EXPECTED[kind]}."
    return f"{name} is {_short(value)}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


def _nearest_of(value: Any, allowed: str) -> str:
    """The nearest of the choices that pydantic lists as "'a', 'b' or 'c'"."""
    return nearest(str(value), re.findall(r"'(.*?)'", allowed))


def valid_names(model: type[BaseModel], location: Iterable[Any]) -> list[str]:
    """The keys that a recipe has at `location`."""
    names: list[str] = [*model.model_fields, "stage_defaults"]
    annotation: Any = model
    for part in location:
        annotation = _inner(annotation, part)
        names = list(annotation.model_fields) if _is_section(annotation) else []
    return names


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _inner(annotation: Any, part: Any) -> Any:
    """The type of what lies at `part` of a value of type `annotation`."""
    if _is_section(annotation):
        field = annotation.model_fields.get(part)
        annotation = field.annotation if field else None
    elif typing.get_origin(annotation) in (list, dict):
        annotation = typing.get_args(annotation)[-1]
    if typing.get_origin(annotation) is typing.Annotated and str(part).startswith(TAG):
        choices = typing.get_args(typing.get_args(annotation)[0])
        return next(typing.get_args(choice)[0] for choice in choices if Tag(part) in typing.get_args(choice))
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next(choice for choice in typing.get_args(annotation) if choice is not type(None))
    return annotation


def _in(values: Any, path: Iterable[Any]) -> bool:
    for part in path:
        keys = values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
        if part not in keys:
            return False
        values = values[part]
    return True


def _dotted(location: Iterable[Any]) -> str:
    return ".".join(str(part) for part in location) or "the recipe"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
