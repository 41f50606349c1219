"""Configurations: named sets of clauses, and functions that make them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from headoff.choices import DEFAULT_SITE, Site
from headoff.errors import GateError
from headoff.gates.clauses import Clause, HeadLayout, Heads
from headoff.gates.orders import Order, check_order
from headoff.gates.text import describe_clauses, format_clauses
from headoff.gates.validation import check_site, matrix, number, numbers
from headoff.wording import counted


@dataclass(frozen=True)
class Configuration:
    """A named set of clauses. Their gates multiply: their order does not matter, and a head that one of them switches
    off is off.

    The name is a label: configurations are equal if their clauses are equal. An empty name is replaced by an automatic
    one, which says what is off: `L5H2 off`, `query 17: only H0-3 on`. `at`, `on_layers`, `for_queries`,
    `for_objects` and `&` return configurations with automatic names, because the old name would no longer describe the
    clauses.
    """

    name: str = field(default="", compare=False)
    clauses: tuple[Clause, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "clauses", tuple(sorted(self.clauses, key=Clause.sort_key)))
        if not self.name:
            object.__setattr__(self, "name", describe_clauses(self.clauses))

    @property
    def text(self) -> str:
        """The canonical text, which `parse_configuration` reads back as an equal configuration."""
        return format_clauses(self.clauses)

    @property
    def sites(self) -> frozenset[Site]:
        """The sites that the clauses are about."""
        return frozenset(clause.site for clause in self.clauses)

    def named(self, name: str) -> "Configuration":
        """The same clauses under another name."""
        return replace(self, name=name)

    def at(self, site: Site) -> "Configuration":
        """The same clauses, all of them at `site`."""
        return Configuration(clauses=tuple(replace(clause, site=site) for clause in self.clauses))

    def on_layers(self, *layers: int) -> "Configuration":
        """Restricted to these layers, without clauses that act in none of them. Raises GateError if none acts there."""
        return self._restricted("layers", numbers("layer", layers))

    def for_queries(self, *queries: int) -> "Configuration":
        """Restricted to the rows of these object queries. Raises GateError if no clause acts on them."""
        return self._restricted("queries", numbers("query", queries))

    def for_objects(self, *objects: int) -> "Configuration":
        """Restricted to the queries of these objects: detections with nothing off, by falling score from 0.

        Which queries these are depends on the image: `headoff.sweep` and `headoff.explain` find them.

        Raises:
            GateError: no clause acts on them, or one names queries already.
        """
        return self._restricted("objects", numbers("object", objects))

    @property
    def names_objects(self) -> bool:
        """Whether a clause is about objects, so that gates can be made only for an image."""
        return any(clause.objects is not None for clause in self.clauses)

    def with_queries(self, query_of: Callable[[int], int]) -> "Configuration":
        """Under the same name, with the query `query_of(object)` in the place of each object."""
        clauses = [
            clause
            if clause.objects is None
            else replace(clause, objects=None, queries=tuple(map(query_of, clause.objects)))
            for clause in self.clauses
        ]
        return Configuration(self.name, tuple(clauses))

    def _restricted(self, to: str, indices: tuple[int, ...] | None) -> "Configuration":
        """With the field `to` of each clause (`layers`, `queries` or `objects`) restricted to `indices`."""
        clauses = []
        for clause in self.clauses:
            current = getattr(clause, to)
            remaining = indices if current is None else tuple(set(current) & set(indices or ()))
            if remaining:
                restricted: dict[str, Any] = {to: remaining}
                clauses.append(replace(clause, **restricted))
        if self.clauses and not clauses:
            raise GateError(
                f"{self._quoted()} does not act on the {to} {', '.join(map(str, indices or ()))}: "
                f"restrict it to {to} that it acts on"
            )
        return Configuration(clauses=tuple(clauses))

    def __and__(self, other: "Configuration") -> "Configuration":
        """The clauses of both: their gates multiply."""
        if not isinstance(other, Configuration):
            return NotImplemented
        return Configuration(clauses=self.clauses + other.clauses)

    def check(self, layout: HeadLayout) -> None:
        """Raise GateError if `layout` lacks a layer, head or query, or if off amounts have another shape."""
        for clause in self.clauses:
            clause.check(layout, self._quoted())

    def gate(self, site: Site, layout: HeadLayout) -> Tensor | None:
        """The gate of each head at `site`.

        Returns:
            float32 (layers, queries, heads), or (layers, 1, heads) if it is the same for all queries; None if
            everything is on.

        Raises:
            GateError: `layout` lacks a layer, head or query, off amounts have another shape, or objects are named.
        """
        self.check(layout)
        if self.names_objects:
            raise GateError(
                f"{self._quoted()} names objects, and which queries detect these is known for an image only: give it "
                "to headoff.sweep or headoff.explain, or name queries"
            )
        layers, heads = layout.layers(site), layout.heads_at(site)
        clauses = [clause for clause in self.clauses if clause.site == site]
        rows = 1 if all(clause.queries is None for clause in clauses) else layout.queries
        gate = torch.ones(layers, rows, heads, dtype=torch.float64)
        for clause in clauses:
            queries = slice(None) if clause.queries is None else list(clause.queries)
            gate[:, queries] *= clause.values(layers, heads)[:, None, :]
        return None if bool((gate == 1).all()) else gate.float()

    def _quoted(self) -> str:
        """For error messages; long names, such as that of an off matrix, are cut short."""
        return f"configuration '{self.name if len(self.name) <= 60 else self.name[:57] + '...'}'"


def none_off(*, site: Site = DEFAULT_SITE) -> Configuration:
    """The baseline: everything on, at every site. `site` is accepted because all constructors accept it."""
    check_site(site)
    return Configuration()


def first_off(k: int, order: Order | None = None, *, site: Site = DEFAULT_SITE) -> Configuration:
    """The first `k` heads off in all layers.

    Args:
        k: number of heads.
        order: a permutation of the heads, or a matrix (layers, heads) with a permutation for each layer; 0, 1, 2, ...
            if None.
        site: where.

    Raises:
        GateError: `order` is neither, or has fewer than `k` heads.
    """
    k = number("a count of heads", k)
    rows = None if order is None else check_order(order)
    if rows is not None and k > len(rows[0]):
        raise GateError(
            f"the first {k} heads cannot be off: the order has only "
            f"{counted(len(rows[0]), 'head')}, ask for no more than that"
        )
    if not k:
        return none_off(site=site)
    if rows is None or len(rows) == 1:
        configuration = heads_off(*(range(k) if rows is None else rows[0][:k]), site=site)
    else:
        # A matrix rather than a clause per layer: a detector with another number of layers rejects it.
        configuration = off_matrix([[head in row[:k] for head in range(len(row))] for row in rows], site=site)
    place = "" if site == DEFAULT_SITE else f"{site} "
    return configuration.named(f"{place}first {k} off")


def last_off(k: int, *, site: Site = DEFAULT_SITE) -> Configuration:
    """The last `k` heads off in all layers, however many heads a layer has."""
    k = number("a count of heads", k)
    return Configuration(clauses=(Clause(site, last=k),)) if k else none_off(site=site)


def heads_off(*heads: int, layers: Iterable[int] | None = None, site: Site = DEFAULT_SITE) -> Configuration:
    """These heads off in `layers`, in all layers if None. Without heads, nothing is off."""
    if not heads:
        return none_off(site=site)
    return Configuration(clauses=(Clause(site, layers=numbers("layer", layers), heads=heads),))


def layers_off(*layers: int, site: Site = DEFAULT_SITE) -> Configuration:
    """All heads of these layers off. Without layers, nothing is off."""
    if not layers:
        return none_off(site=site)
    return Configuration(clauses=(Clause(site, layers=layers),))


def only_heads_on(
    *heads: int, layers: Iterable[int] | None = None, site: Site = DEFAULT_SITE
) -> Configuration:
    """All heads of all layers off except these, which stay on in `layers`, in all layers if None.

    Without heads, everything is off.
    """
    kept = (Heads(numbers("layer", layers), heads),) if heads else ()
    return Configuration(clauses=(Clause(site, kept_heads=kept),))


def off_vector(values: Iterable[float], *, site: Site = DEFAULT_SITE) -> Configuration:
    """One off amount per head, the same in all layers: [0, 1, 0.25, ...] has the gate [1, 0, 0.75, ...]."""
    return off_matrix([values], site=site)


def off_matrix(rows: Iterable[Iterable[float]], *, site: Site = DEFAULT_SITE) -> Configuration:
    """Off amounts (layers, heads) from 0 to 1; a single row applies to all layers."""
    return Configuration(clauses=(Clause(site, off=matrix("off amounts", rows)),))


def cumulative(
    heads: int = 8, order: Order | None = None, *, site: Site = DEFAULT_SITE
) -> tuple[Configuration, ...]:
    """The cumulative sweep: `none off`, `first 1 off`, ..., heads + 1 configurations, along `order`."""
    if order is not None:
        check_order(order, heads)
    return tuple(first_off(k, order, site=site) for k in range(heads + 1))


def single_heads(layers: int = 6, heads: int = 8, *, site: Site = DEFAULT_SITE) -> tuple[Configuration, ...]:
    """One configuration per head, with only that head off: `L0H0 off`, `L0H1 off`, ..., layers * heads in total."""
    places = product(range(layers), range(heads))
    return tuple(heads_off(head, layers=[layer], site=site) for layer, head in places)


def all_subsets(heads: int = 8, *, site: Site = DEFAULT_SITE) -> tuple[Configuration, ...]:
    """All 2^heads subsets of heads off, in all layers: head h is off if bit h of the configuration's index is set."""
    return tuple(
        heads_off(*(head for head in range(heads) if subset >> head & 1), site=site)
        for subset in range(2**heads)
    )
