"""Token fields: what encoders produce, shards store and stages condition on or predict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from math import lcm
from typing import Any

CONDITIONING = "conditioning"
SEMANTIC = "semantic"
ACOUSTIC = "acoustic"


@dataclass(frozen=True)
class TokenField:
    """One named kind of token.

    `rate_hz` is frames a second (0.2 is one frame every five seconds); codes of the field are integers
    `[batch, frames, quantizers]` in `[0, codebook_size)`.
    """

    name: str
    rate_hz: float
    quantizers: int
    codebook_size: int

    @property
    def rate(self) -> Fraction:
        """The rate as an exact fraction: windows of different rates are cut on one clock without rounding drift."""
        return Fraction(self.rate_hz).limit_denominator(1_000_000)

    def frames(self, seconds: float | Fraction) -> int:
        """Whole frames in `seconds`."""
        return int(Fraction(seconds).limit_denominator(1_000_000) * self.rate)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TokenField:
        return cls(**value)


def common_period(fields: list[TokenField]) -> Fraction:
    """The shortest time, in seconds, after which all `fields` start a frame together: the grid windows are cut on."""
    periods = [1 / field.rate for field in fields]
    denominator = lcm(*(period.denominator for period in periods))
    return Fraction(lcm(*(int(period * denominator) for period in periods)), denominator)
