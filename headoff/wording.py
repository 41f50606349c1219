"""Numbers in the words of messages, tables and reports."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from itertools import groupby


def number_ranges(numbers: Iterable[int], separator: str = ", ") -> str:
    """Sorted whole numbers, with runs of consecutive numbers as ranges: `0-2, 5`."""
    # In a run of consecutive numbers, number minus index is constant.
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return separator.join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def with_article(noun: str) -> str:
    """`a head`, `an object`."""
    return f"{'an' if noun[:1] in 'aeiou' else 'a'} {noun}"


def counted(number: int, noun: str) -> str:
    """A count and its noun: `1 check`, `3,000 checks`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_seconds(seconds: float) -> str:
    """Three significant digits in the unit that suits: `0.3 ms`, `12.5 s`, `3 min 5 s`, `2 h 4 min`."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= 0.9995 * size:
            return f"{three_digits(seconds / size)} {unit}"
    return f"{three_digits(seconds / 1e-9)} ns" if seconds else "0 s"


def format_bytes(count: int | None, unknown: str = "-") -> str:
    """Three significant digits in binary units: `1.5 GiB`; `unknown` for None."""
    if count is None:
        return unknown
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{three_digits(count / size)} {unit}"
    return f"{count} B"


def three_digits(value: float) -> str:
    """A number with three significant digits, or all of its whole part: `1.23`, `12.3`, `123`, `1235`."""
    return f"{value:.{0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2}f}"


def format_error(value: float) -> str:
    """An error or a tolerance with two digits: `3.1e-02`."""
    return _special(value) or f"{value:.1e}"


def format_ratio(value: float) -> str:
    """A ratio with three decimals, without decimals from 99.5 on: `0.834`, `1.000`, `123`."""
    return _special(value) or (f"{value:.3f}" if abs(value) < 99.5 else f"{value:,.0f}")


def format_times(value: float) -> str:
    """How many times as much, with two or three digits: `2.50 times`, `7,600 times`."""
    if not math.isfinite(value):
        return "infinitely many times"
    if value >= 1e6:
        return f"{value:.0e} times"
    if value >= 100:
        return f"{round(value, 1 - int(math.log10(value))):,.0f} times"
    return f"{three_digits(value)} times"


def _special(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinite" if math.isinf(value) else ""


def markdown_table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    padded: bool = True,
    right: Container[int] | None = None,
) -> list[str]:
    """The lines of a Markdown table.

    Args:
        padded: whether cells are filled up to the width of their column, which a terminal needs and a page does not.
        right: columns that are aligned to the right: by default all but the first where padded, and else none.
    """
    lines = [[str(cell) for cell in cells] for cells in (head, *rows)]
    if right is None:
        right = range(1, len(lines[0])) if padded else ()
    widths = [max(3, *map(len, column)) if padded else 0 for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |"

    if padded:
        rule = ["-" * (width - 1) + (":" if place in right else "-") for place, width in enumerate(widths)]
    else:
        rule = ["---:" if place in right else "---" for place in range(len(widths))]
    return [line(cells) for cells in (lines[0], rule, *lines[1:])]
