"""Which records are trained on, by their columns of the manifest. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, StrictBool, StrictFloat, StrictInt, StrictStr, Tag, model_validator

from model.config import Config
from model.errors import UserError, nearest

Value = StrictBool | StrictInt | StrictFloat | StrictStr


class Range(Config):
    """Numbers from `min` to `max`, both included."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.min is None and self.max is None:
            raise ValueError("a range needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} must be at most max {self.max:g}")
        return self


def _kind(rule: Any) -> str:
    """What a rule is meant to be, so that what is wrong with it is said of that alone."""
    return "dict[range]" if isinstance(rule, dict | Range) else "list[value]" if isinstance(rule, list) else "str"


Rule = Annotated[
    Annotated[Range, Tag("dict[range]")]
    | Annotated[list[Value], Field(min_length=1), Tag("list[value]")]
    | Annotated[Value, Tag("str")],
    Discriminator(_kind),
]
Filter = dict[str, Rule]
"""Column → the value, one of the values or the range that a record must have there."""


def passing(columns: Mapping[str, Sequence[Any]], rules: Filter, where: str) -> NDArray[np.bool_]:
    """Which records of `columns`, each with a value a record, pass all `rules`; a record without a value passes none.

    Raises UserError for a column that is not there, and for a range of what are not numbers; `where` names the corpus.
    """
    kept = np.ones(len(next(iter(columns.values()))), bool)
    for name, rule in rules.items():
        if name not in columns:
            raise UserError(
                f"train.filter names the column {name!r}, which {where} does not have.{nearest(name, columns)} "
                f"It has {', '.join(columns)}."
            )
        try:
            kept &= np.fromiter(map(_test(rule), columns[name]), bool, len(kept))
        except TypeError:
            raise UserError(
                f"train.filter gives the column {name!r} a range, but in {where} it does not hold numbers: "
                f"name its values instead."
            ) from None
    return kept


def _test(rule: Any) -> Callable[[Any], bool]:
    if isinstance(rule, Range):
        low = -np.inf if rule.min is None else rule.min
        high = np.inf if rule.max is None else rule.max
        return lambda value: value is not None and low <= value <= high
    wanted = set(rule) if isinstance(rule, list) else {rule}
    return lambda value: value in wanted
