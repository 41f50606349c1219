"""Checks of arguments: heads, layers, gates and matrices. All of them raise GateError with a remedy."""

import operator
from collections.abc import Iterable
from typing import Any

from headoff.choices import SITES, Site
from headoff.errors import GateError
from headoff.wording import with_article

# No detector has as many layers, heads or queries; a larger number is a typing error, and would fill the memory.
MAX_NUMBER = 9999


def check_site(name: str) -> str:
    """`name`, if there is such a site."""
    if name not in SITES:
        raise GateError(f"there is no attention site '{name}': use one of {', '.join(SITES)}")
    return name


def number(what: str, value: Any) -> int:
    """An index or a count. `what` comes with its article: 'a head'."""
    try:
        index = operator.index(value)
    except TypeError:
        index = -1
    if not 0 <= index <= MAX_NUMBER:
        raise GateError(f"{what} must be a whole number from 0 to {MAX_NUMBER}: {value!r} is not")
    return index


def numbers(noun: str, values: Iterable[int] | None) -> tuple[int, ...] | None:
    """Numbers of layers, heads or queries, sorted and without duplicates; None stays None."""
    if values is None:
        return None
    if isinstance(values, (str, int)):
        raise GateError(f"{noun} numbers must be a list: {values!r} is not")
    indices = tuple(sorted({number(f"{with_article(noun)} number", value) for value in values}))
    if not indices:
        raise GateError(f"the list of {noun} numbers is empty: name at least one, or None for all")
    return indices


def fraction(what: str, value: Any) -> float:
    """A number from 0 to 1."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = -1.0
    if not 0 <= result <= 1:  # NaN fails this as well
        raise GateError(f"{what} {value!r} is invalid: it must be a number from 0 to 1")
    return result + 0.0  # -0.0 becomes 0.0


def plain(values: Any) -> Any:
    """Tensors, arrays and sequences as nested lists of numbers."""
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, Iterable) and not isinstance(values, str):
        return [plain(value) for value in values]
    return values


def matrix(what: str, values: Any) -> tuple[tuple[Any, ...], ...]:
    """A matrix as tuples of rows; a vector becomes a matrix of one row."""
    rows = plain(values)
    if isinstance(rows, list) and not any(isinstance(row, list) for row in rows):
        rows = [rows]
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows):
        raise GateError(f"{what} must be a vector or a matrix, not {rows!r}: give one number per head")
    if len({len(row) for row in rows}) > 1:
        raise GateError(
            f"{what} are in rows of different lengths, {', '.join(str(len(row)) for row in rows)}: "
            "give one number per head in each row"
        )
    return tuple(map(tuple, rows))


def check_exist(subject: str, noun: str, indices: tuple[int, ...] | None, count: int, site: Site) -> None:
    """Raise GateError, with `subject` as the subject of its sentence, if an index is not below `count`."""
    missing = [str(index) for index in indices or () if index >= count]
    if missing:
        available = f"goes from {noun} 0 to {noun} {count - 1}" if count else f"has no {noun} at all"
        raise GateError(
            f"{subject} names {noun} {', '.join(missing)}, but at {site} this detector {available}: "
            "use a number that exists"
        )
