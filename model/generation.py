"""What may be asked of a bundle when it makes music, checked once for Python and the command line alike.

Imports no torch: the command line refuses a bad value before it waits for a bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from model.config import STAGES, SamplingConfig
from model.errors import UserError, nearest

ALLOWED = {
    "temperature": "a number that is 0 or more",
    "top_k": "a whole number that is 1 or more",
    "top_p": "a number that is more than 0 and at most 1",
    "cfg": "a number that is 0 or more",
    "seconds": "a number that is more than 0",
    "samples": "a whole number that is 1 or more",
    "seed": "a whole number that is 0 or more and less than 2^62",
    "overlap": "a number that is 0 or more and less than 1",
}
"""The bounds below in words."""


class GenerationConfig(SamplingConfig):
    """How to draw where the caller says so, stage by stage, and how much to make."""

    seconds: PositiveFloat | None = None
    """Length; the semantic stage's window when not given."""
    samples: PositiveInt = 1
    """Pieces for each prompt or recording."""
    seed: int = Field(0, ge=0, lt=2**62)
    """The first piece's; the next ones count up. Each is multiplied by the number of stages, within torch's 64 bits."""
    overlap: float = Field(0.5, ge=0, lt=1)
    """Share of a window that the next one takes up again, where music is longer than a window."""

    @classmethod
    def of(cls, options: Mapping[str, Any], name: Callable[[str], str] = str) -> GenerationConfig:
        """`options` with their types, those that are None left out.

        A `temperature`, `top_k`, `top_p` or `cfg` that is not a mapping from stages holds for all of them. Numbers may
        be text. Raises UserError for the first that is not allowed, called `name(option)`.
        """
        given = {option: _by_stage(option, value) for option, value in options.items() if value is not None}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
        option, *stage = problem["loc"]
        if "[key]" in stage:
            raise UserError(f"{name(str(option))}: {_no_stage(str(stage[0]))}")
        one = isinstance(options[str(option)], Mapping) and stage
        where = f"{name(str(option))} of {stage[0]}" if one else name(str(option))
        raise UserError(f"{where} is {problem['input']!r}: it must be {ALLOWED[str(option)]}.")


def _by_stage(option: str, value: Any) -> Any:
    if option not in SamplingConfig.model_fields or isinstance(value, Mapping):
        return value
    return dict.fromkeys(STAGES, value)


def _no_stage(name: str) -> str:
    return f"there is no stage {name!r}.{nearest(name, STAGES)} Choose {', '.join(STAGES)}."
