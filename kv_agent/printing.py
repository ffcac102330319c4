"""How the command prints values: aligned, readable, and harmless to a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60))


def table(*rows: Sequence[object]) -> list[str]:
    """Rows as aligned columns."""
    cells = [[printable("-" if cell is None else str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def printable(text: str) -> str:
    """Control characters escaped: what a model wrote must not steer the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def size(num_bytes: int) -> str:
    power = max(0, min((num_bytes.bit_length() - 1) // 10, 4))
    return f"{num_bytes / 1024**power:.1f} {'KMGT'[power - 1]}iB" if power else f"{num_bytes} B"


def date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def span(seconds: float) -> str:
    """A stretch of time in the largest unit of which it has one."""
    whole = int(max(0.0, seconds))
    for unit, unit_s in _UNITS:
        if whole >= unit_s:
            return f"{whole // unit_s} {unit}"
    return f"{whole} s"
