"""Which kind of sweep configurations make: cumulative, single heads, subsets, or none of these.

The kind follows from the configurations themselves, so that a sweep made in Python is drawn and described like one of
the command line.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from headoff.choices import DEFAULT_SITE, SITES, Site
from headoff.gates.clauses import Clause
from headoff.gates.configurations import Configuration

_FIRST_OFF = re.compile(rf"(?:({'|'.join(SITES)}) )?first (\d+) off")


@dataclass(frozen=True)
class CumulativeSweep:
    """Nothing off, then one more head in every configuration; configuration k has k heads off."""

    heads: int


@dataclass(frozen=True)
class SingleHeadSweep:
    """Every head of some layers off alone, in any order, with or without configurations that have nothing off.

    Attributes:
        site: where all of the heads are.
        layers, heads: the rows and columns of the grid, sorted.
        configurations: index of the configuration of each layer and head.
    """

    site: Site
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    configurations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SubsetSweep:
    """All 2^n subsets of n heads, in any order, all of them in the same layers.

    Attributes:
        heads: the n heads, sorted.
        off: the heads that are off in each configuration, sorted.
    """

    heads: tuple[int, ...]
    off: tuple[tuple[int, ...], ...]


SweepKind = CumulativeSweep | SingleHeadSweep | SubsetSweep


@dataclass(frozen=True)
class _Off:
    """Heads that are fully off: the same ones in all of `layers`, or in every layer (None)."""

    site: Site
    queries: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    """Queries and objects; None stands for all."""
    layers: tuple[int, ...] | None
    heads: tuple[int, ...]


def kind_of(configurations: Sequence[Configuration]) -> SweepKind | None:
    """The kind of sweep that `configurations` make; None if it is none of the three."""
    return _cumulative(configurations) or _single_heads(configurations) or _subsets(configurations)


def sweeps_among(configurations: Sequence[Configuration]) -> list[tuple[SweepKind, tuple[int, ...]]]:
    """The sweeps that are among `configurations`, which may be several at once, for all queries.

    Returns:
        Each kind with the indices of its configurations, the baseline first where there is one. The kind's own indices
        count these.
    """
    found: list[tuple[SweepKind, tuple[int, ...]]] = []
    offs = {index: _off(one) for index, one in enumerate(configurations)}
    baseline = [index for index, one in enumerate(configurations) if not one.clauses][:1]
    for site in SITES:
        here = {
            index: off
            for index, off in offs.items()
            if off is not None and off.site == site and off.queries == (None, None)
        }
        columns = {off.heads: index for index, off in here.items() if off.layers is None}
        steps: dict[int, int] = {}
        for index, one in enumerate(configurations):
            named = _first_off_name(one.name)
            if named and named[0] == site:
                # One of that name that comes later is along another order.
                steps.setdefault(named[1], index)
        if not steps:
            heads = len({head for one in columns for head in one})
            steps = {k: columns[tuple(range(k))] for k in range(1, heads + 1) if tuple(range(k)) in columns}
        single = [
            index
            for index, off in here.items()
            if off.layers is not None and len(off.layers) == len(off.heads) == 1
        ]
        for finder, indices in (
            (_cumulative, [steps[k] for k in sorted(steps)]),
            (_single_heads, single),
            (_subsets, [*columns.values()]),
        ):
            indices = baseline + indices
            kind = finder([configurations[index] for index in indices])
            if kind is not None:
                found.append((kind, tuple(indices)))
    return found


def order_of(configurations: Sequence[Configuration]) -> tuple[int, ...]:
    """The order in which a cumulative sweep switches heads off, if it is one order for all layers; else empty."""
    found: dict[int, None] = {}
    for one in configurations:
        off = _off(one) if one.clauses else None
        if one.clauses and (off is None or off.layers is not None):
            return ()
        found |= dict.fromkeys([] if off is None else [h for h in off.heads if h not in found])
    return tuple(found)


def _cumulative(configurations: Sequence[Configuration]) -> CumulativeSweep | None:
    """By name (`first k off`), whatever the order of heads in each layer, or by clauses."""
    if len(configurations) < 2 or configurations[0].clauses:
        return None
    steps = configurations[1:]
    named = [_first_off_name(step.name) for step in steps]
    site = named[0][0] if named[0] else None
    if named == [(site, k) for k in range(1, len(configurations))] or _adds_one_head_each(steps):
        return CumulativeSweep(len(steps))
    return None


def _first_off_name(name: str) -> tuple[str, int] | None:
    """Site and k of a name `first k off`; None for other names."""
    match = _FIRST_OFF.fullmatch(name)
    return (match[1] or DEFAULT_SITE, int(match[2])) if match else None


def _adds_one_head_each(steps: Sequence[Configuration]) -> bool:
    before: set[int] = set()
    wheres = set()
    for step in steps:
        off = _off(step)
        if off is None or not before < set(off.heads) or len(off.heads) != len(before) + 1:
            return False
        before = set(off.heads)
        wheres.add((off.site, off.queries, off.layers))
    ((_, _, layers), *others) = wheres
    return not others and layers is None


def _single_heads(configurations: Sequence[Configuration]) -> SingleHeadSweep | None:
    places: dict[tuple[int, int], int] = {}
    wheres = set()
    for index, configuration in enumerate(configurations):
        if not configuration.clauses:
            continue
        off = _off(configuration)
        if off is None or off.layers is None or len(off.layers) != 1 or len(off.heads) != 1:
            return None
        place = off.layers[0], off.heads[0]
        if place in places:
            return None
        places[place] = index
        wheres.add((off.site, off.queries))
    layers = tuple(sorted({layer for layer, _ in places}))
    heads = tuple(sorted({head for _, head in places}))
    if len(wheres) != 1 or len(places) < 2 or len(places) != len(layers) * len(heads):
        return None
    ((site, _),) = wheres
    grid = tuple(tuple(places[layer, head] for head in heads) for layer in layers)
    return SingleHeadSweep(site, layers, heads, grid)


def _subsets(configurations: Sequence[Configuration]) -> SubsetSweep | None:
    sets: list[tuple[int, ...]] = []
    wheres = set()
    for configuration in configurations:
        if not configuration.clauses:
            sets.append(())
            continue
        off = _off(configuration)
        if off is None:
            return None
        sets.append(off.heads)
        if off.heads:
            wheres.add((off.site, off.queries, off.layers))
    heads = tuple(sorted({head for one in sets for head in one}))
    # Distinct subsets of n heads are all of them if there are 2^n.
    if len(wheres) != 1 or len(heads) < 2 or not len(sets) == len(set(sets)) == 2 ** len(heads):
        return None
    return SubsetSweep(heads, tuple(sets))


def _off(configuration: Configuration) -> _Off | None:
    """What is off, if that is one clause without fractions that names its heads; else None."""
    if len(configuration.clauses) != 1:
        return None
    (clause,) = configuration.clauses
    if clause.off is not None:
        return _off_in_matrix(clause, clause.off)
    # The last heads are counted from the end, as nothing here says how many there are.
    heads = clause.heads if clause.last is None else tuple(range(-clause.last, 0))
    if clause.kept_heads or clause.gate != 0 or heads is None:
        return None
    return _Off(clause.site, (clause.queries, clause.objects), clause.layers, heads)


def _off_in_matrix(clause: Clause, rows: Sequence[Sequence[float]]) -> _Off | None:
    if any(value not in (0, 1) for row in rows for value in row):
        return None
    found = [tuple(head for head, value in enumerate(row) if value) for row in rows]
    if len(set(found)) == 1:
        return _Off(clause.site, (clause.queries, clause.objects), clause.layers, found[0])
    chosen = range(len(rows)) if clause.layers is None else clause.layers
    layers = tuple(layer for layer in chosen if layer < len(rows) and found[layer])
    heads = {found[layer] for layer in layers}
    return (
        _Off(clause.site, (clause.queries, clause.objects), layers, heads.pop()) if len(heads) == 1 else None
    )
