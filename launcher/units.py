"""Numbers as people read them. Used by everything that prints."""

from __future__ import annotations

_LARGE = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIMES = ((365.25 * 86_400, "years"), (86_400, "days"), (3_600, "h"), (60, "min"), (1, "s"))


def short(value: float, unit: str = "") -> str:
    """Three figures and a decimal prefix: 90587648 → "90.6 M", with unit "B" "90.6 MB"."""
    for factor, prefix in _LARGE:
        if abs(value) >= 0.9995 * factor:
            return f"{_three_figures(value / factor)} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip() if value == int(value) else f"{_three_figures(value)} {unit}".rstrip()


def size(count: float) -> str:
    """Bytes in decimal multiples: 1500000 → "1.5 MB"."""
    return short(count, "B")


def counted(number: int, noun: str) -> str:
    """1, "shard" → "1 shard"; 1200, "shard" → "1,200 shards"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def duration(seconds: float) -> str:
    """Seconds as the two largest units that matter: "0.4 s", "45 s", "12 min 5 s", "3 h 20 min", "2.5 days"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole >= 2 * 86_400:
        factor, name = next((factor, name) for factor, name in _TIMES if whole >= 2 * factor)
        return f"{_three_figures(whole / factor)} {name}"
    if whole >= 3_600:
        return _pair(round(whole / 60), 60, "h", "min")
    return _pair(whole, 60, "min", "s") if whole >= 60 else f"{whole} s"


def _pair(value: int, base: int, large: str, small: str) -> str:
    first, second = divmod(value, base)
    return f"{first} {large} {second} {small}" if second else f"{first} {large}"


def _three_figures(value: float) -> str:
    decimals = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
