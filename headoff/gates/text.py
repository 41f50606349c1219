"""Clauses as text. `headoff.gates.parse` documents the notation and reads it back."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from headoff.choices import DEFAULT_SITE
from headoff.gates.clauses import Clause, Heads
from headoff.wording import number_ranges


def format_clauses(clauses: Iterable[Clause]) -> str:
    """The canonical text: equal clauses have equal text, and parsing it gives equal clauses."""
    return "; ".join(_statements(clauses)) or "none"


def describe_clauses(clauses: Iterable[Clause]) -> str:
    """The name of a configuration of these clauses: its text, with "off" where that reads better."""
    return "; ".join(_statements(clauses, off=" off")) or "none off"


def _statements(clauses: Iterable[Clause], off: str = "") -> Iterator[str]:
    """The text of each statement; `off` is appended to lists of heads that are off."""
    # Lists of heads share a statement; kept heads, last heads and off amounts need statements of their own.
    for (site, queries, objects, is_list), group in groupby(
        clauses,
        key=lambda clause: (
            clause.site,
            clause.queries,
            clause.objects,
            not clause.kept_heads and clause.off is None and clause.last is None,
        ),
    ):
        scope = f"query {number_ranges(queries, ',')}: " if queries else ""
        scope += f"object {number_ranges(objects, ',')}: " if objects else ""
        scope += "" if site == DEFAULT_SITE else f"{site} "
        if is_list:
            listed = list(group)
            items = [
                _format_heads(Heads(clause.layers, clause.heads))
                + (f"={_format_fraction(clause.gate)}" if clause.gate else "")
                for clause in listed
            ]
            yield scope + ",".join(items) + ("" if any(clause.gate for clause in listed) else off)
            continue
        for clause in group:
            layers = f"layer {number_ranges(clause.layers, ',')}: " if clause.layers else ""
            if clause.last is not None:
                pattern = f"last {clause.last}{off}"
            elif clause.off is None:
                pattern = f"only {','.join(map(_format_heads, clause.kept_heads))} on"
            else:
                pattern = "/".join(",".join(map(_format_fraction, row)) for row in clause.off)
            yield scope + layers + pattern


def _format_heads(where: Heads) -> str:
    layers = f"L{number_ranges(where.layers, '+')}" if where.layers else ""
    heads = f"H{number_ranges(where.heads, '+')}" if where.heads else ""
    return layers + heads or "all"


def _format_fraction(value: float) -> str:
    return repr(value).removesuffix(".0")  # repr has as many digits as reading the same number back takes
