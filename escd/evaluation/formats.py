"""How numbers are written in tables: shares, decimals, differences and intervals."""

from __future__ import annotations

from .measure import Interval

MISSING = "--"


def decimals(value: float | None, places: int = 2) -> str:
    """0.123 -> "0.12"."""
    return MISSING if value is None else f"{value:.{places}f}"


def percent(share: float) -> str:
    """0.123 -> "12"."""
    return f"{100 * share:.0f}"


def share_of(value: float | None) -> str:
    """0.123 -> "12 %"."""
    return MISSING if value is None else f"{percent(value)} %"


def signed(value: float, places: int = 2) -> str:
    """0.123 -> "+0.12"; what rounds to zero is written "+0.00", whatever its sign."""
    text = f"{value:+.{places}f}"
    return text if float(text) else text.replace("-", "+")


def interval(value: Interval | None, places: int = 2) -> str:
    """Mean and 95 % interval: "+0.12 [+0.08, +0.16]"."""
    if value is None:
        return MISSING
    mean, low, high = (signed(number, places) for number in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns, all but the first, are aligned to the right."""
    lines = [_line(heads), "|---|" + "--:|" * (len(heads) - 1), *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
