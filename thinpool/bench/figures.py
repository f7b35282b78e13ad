"""Measured values and parameters as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from thinpool.units import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from thinpool.bench.results import Series

_SIZES: Final = frozenset({"size", "length", "block"})


def value(number: float, unit: str) -> str:
    """A value with its unit, three digits."""
    if unit == "s":
        return seconds(number)
    if unit == "bytes":
        return format_size(round(number)) if number >= 0 else f"-{format_size(round(-number))}"
    if unit == "bytes/s":
        return f"{format_size(round(number))}/s"
    if unit == "1/s":
        return f"{rate(number)}/s"
    return f"{digits(number)} {unit}".rstrip()


def seconds(number: float) -> str:
    """1.23 ms and the like."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if abs(number) * factor >= 1:
            return f"{digits(number * factor)} {unit}"
    return f"{digits(number * 1e9)} ns"


def rate(number: float) -> str:
    """46.1 k and the like."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{digits(number / factor)} {unit}"
    return digits(number)


def digits(number: float) -> str:
    """Three of them, without an exponent."""
    if abs(number) >= 100:  # noqa: PLR2004 - three digits before the point
        return f"{number:.0f}"
    if abs(number) >= 10:  # noqa: PLR2004 - two
        return f"{number:.1f}"
    return f"{number:.2f}"


def spread(series: Series) -> str:
    """The median, and the least and the greatest where they differ: ``14.5 (12.1..16.8) ms``."""
    texts = [
        value(each, series.unit) for each in (series.median, min(series.values), max(series.values))
    ]
    if len(set(texts)) == 1:
        return texts[0]
    numbers, units = zip(*(text.partition(" ")[::2] for text in texts), strict=True)
    if len(set(units)) == 1:
        return f"{numbers[0]} ({numbers[1]}..{numbers[2]}) {units[0]}"
    return f"{texts[0]} ({texts[1]}..{texts[2]})"


def parameters(given: Mapping[str, Any]) -> str:
    """In a line: ``size 1 GiB, depth 32``."""
    return ", ".join(
        f"{name} {format_size(each) if name in _SIZES else each}" for name, each in given.items()
    )
