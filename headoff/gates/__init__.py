"""Head gates: which attention heads of a detector are on, off, or in between.

A gate multiplies a head's attention weights after softmax, with no renormalisation: 1 is on, 0 is off,
fractions are legal. People think in what is *off*, the attention wants the gate: gate = 1 - off.

    Clause          one statement: these heads, in these layers, for these queries, at one site
    Configuration   a name and some clauses, whose gates multiply; knows no detector yet
    HeadLayout      what exists in a detector: layers, heads, queries
    Gates           a batch of configurations as tensors, made by `stack` for one layout

    >>> gates = stack(cumulative(), HeadLayout())
    >>> gates.names[:3], gates.decoder_cross.shape
    (('none off', 'first 1 off', 'first 2 off'), torch.Size([9, 6, 1, 8]))

Heads, layers and queries count from 0. The text form of a configuration is `headoff.notation`'s.
"""

import operator
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from headoff.choices import DEFAULT_SITE, SITES, Site
from headoff.errors import GateError

# No detector comes near this many of anything: a larger number is a typing error, and would only eat memory.
MAX_NUMBER = 9999

# A permutation of the heads for all layers, or a matrix (layers, heads) of one per layer.
Order: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class HeadLayout:
    """What exists in a detector. The defaults are DETR's."""

    encoder_layers: int = 6
    decoder_layers: int = 6
    heads: int = 8
    queries: int = 100

    def layers(self, site: Site) -> int:
        """The number of layers that have attention at `site`."""
        return self.encoder_layers if _site(site) == "encoder_self" else self.decoder_layers


@dataclass(frozen=True)
class Heads:
    """Some heads of some layers; None means all of them. Numbers are kept sorted, each once."""

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _numbers("layer", self.layers))
        object.__setattr__(self, "heads", _numbers("head", self.heads))

    def mask(self, layers: int, heads: int) -> Tensor:
        """bool (layers, heads), True where a head is among these."""
        mask = torch.zeros(layers, heads, dtype=torch.bool)
        rows = list(range(layers) if self.layers is None else self.layers)
        columns = list(range(heads) if self.heads is None else self.heads)
        # Indices as tensors, to get every row by every column; with a dtype, for an empty list has none.
        mask[torch.tensor(rows, dtype=torch.long)[:, None], torch.tensor(columns, dtype=torch.long)] = True
        return mask

    def _sort_key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.layers or (), self.heads or ()


@dataclass(frozen=True)
class Clause:
    """One statement about the heads of one site. It takes one of three forms:

    - `heads` of `layers` have the gate `gate`: `Clause(layers=(4,), heads=(2,))` switches L4H2 off;
    - `spared`: every head of `layers` is off except these: `Clause(spared=(Heads((5,), (2,)),))`;
    - `off`: off amounts, one row for all `layers` alike, or a row for each layer of the site, of which only
      those in `layers` act: `Clause(off=((0, 1, 0, 1, 1, 0, 0, 0),))`.

    `layers`, `heads` and `queries` of None mean all. What the clause does not speak of keeps the gate 1.
    Raises GateError for an unknown site, numbers that are no index, values outside 0..1, or mixed forms.
    """

    site: Site = DEFAULT_SITE
    queries: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    gate: float = 0.0
    spared: tuple[Heads, ...] = ()
    off: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        _site(self.site)
        # Equal clauses are to compare equal however they were written, hence everything in a normal form.
        normal = object.__setattr__
        normal(self, "queries", _numbers("query", self.queries))
        normal(self, "layers", _numbers("layer", self.layers))
        normal(self, "heads", _numbers("head", self.heads))
        normal(self, "gate", _fraction("the gate", self.gate))
        normal(self, "spared", tuple(sorted(set(self.spared), key=Heads._sort_key)))
        if self.off is not None:
            normal(self, "off", tuple(tuple(_fraction("the off amount", v) for v in row) for row in self.off))
            if not self.off or not self.off[0] or len({len(row) for row in self.off}) > 1:
                raise GateError(
                    "the rows of off amounts must be equally long and not empty: "
                    f"give one value per head, not rows of {[len(row) for row in self.off]}"
                )
        if (self.heads is not None or self.gate != 0) + bool(self.spared) + (self.off is not None) > 1:
            raise GateError(
                "a clause has either heads with a gate, or spared heads, or off amounts: "
                "combine several clauses with '&' instead"
            )
        if self.queries is not None and self.site == "encoder_self":
            raise GateError(
                "encoder_self has no object queries, its rows are image tokens: "
                "drop the query numbers or use decoder_self or decoder_cross"
            )

    def values(self, layers: int, heads: int) -> Tensor:
        """The gate of each head, float64 (layers, heads), for the queries that the clause is about."""
        acts = Heads(self.layers, self.heads).mask(layers, heads)
        for spared in self.spared:
            acts &= ~spared.mask(layers, heads)
        if self.off is None:
            gate = torch.tensor(self.gate, dtype=torch.float64)
        else:
            gate = 1 - torch.tensor(self.off, dtype=torch.float64)
        return torch.where(acts, gate, 1.0)

    def check(self, layout: HeadLayout, culprit: str) -> None:
        """Raise GateError, with `culprit` as its subject, if the clause names what `layout` does not have."""
        layers = layout.layers(self.site)
        for where in (Heads(self.layers, self.heads), *self.spared):
            _check_exist(culprit, "layer", where.layers, layers, self.site)
            _check_exist(culprit, "head", where.heads, layout.heads, self.site)
        _check_exist(culprit, "query", self.queries, layout.queries, self.site)
        if self.off is not None and len(self.off[0]) != layout.heads:
            raise GateError(
                f"{culprit} has off amounts for {_count(len(self.off[0]), 'head')}, "
                f"but this detector has {layout.heads} at {self.site}: give one per head"
            )
        if self.off is not None and len(self.off) not in (1, layers):
            raise GateError(
                f"{culprit} has an off matrix of {len(self.off)} rows, but this detector "
                f"has {_count(layers, 'layer')} at {self.site}: give one row per layer"
            )

    def _sort_key(self) -> tuple[Any, ...]:
        """A total order, the most general first and clauses of one form side by side."""
        form = bool(self.spared), self.off or ()
        spared = [heads._sort_key() for heads in self.spared]
        return (
            SITES.index(self.site),
            self.queries or (),
            form,
            self.layers or (),
            self.heads or (),
            self.gate,
            spared,
        )


@dataclass(frozen=True)
class Configuration:
    """A named set of clauses. Their gates multiply, so their order does not matter and off wins.

    The name is a label: configurations are equal when their clauses are, whatever they are called. An empty
    name stands for the automatic one, which says what is off: `L5H2 off`, `query 17: only H0-3 on`. What
    `at`, `on_layers`, `for_queries` and `&` return has its automatic name: the old one would not be true.
    """

    name: str = field(default="", compare=False)
    clauses: tuple[Clause, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "clauses", tuple(sorted(self.clauses, key=Clause._sort_key)))
        if not self.name:
            from headoff.notation import describe_clauses  # late: notation is built on this module

            object.__setattr__(self, "name", describe_clauses(self.clauses))

    @property
    def text(self) -> str:
        """The canonical text form, which `headoff.notation.parse_configuration` reads back as an equal."""
        from headoff.notation import format_configuration  # late: notation is built on this module

        return format_configuration(self)

    @property
    def sites(self) -> frozenset[Site]:
        """The sites that the clauses speak of."""
        return frozenset(clause.site for clause in self.clauses)

    def named(self, name: str) -> "Configuration":
        """The same clauses under another name."""
        return replace(self, name=name)

    def at(self, site: Site) -> "Configuration":
        """The same clauses, all of them at `site`."""
        return Configuration(clauses=tuple(replace(clause, site=site) for clause in self.clauses))

    def on_layers(self, *layers: int) -> "Configuration":
        """Restricted to these layers: clauses that act in none of them vanish; GateError if all would."""
        return self._restricted("layers", _numbers("layer", layers))

    def for_queries(self, *queries: int) -> "Configuration":
        """Restricted to some object queries: the gates act on their rows only; GateError if none is left."""
        return self._restricted("queries", _numbers("query", queries))

    def _restricted(self, to: str, numbers: tuple[int, ...] | None) -> "Configuration":
        clauses = []
        for clause in self.clauses:
            current = getattr(clause, to)
            left = numbers if current is None else tuple(set(current) & set(numbers or ()))
            if left:
                restricted: dict[str, Any] = {to: left}
                clauses.append(replace(clause, **restricted))
        if self.clauses and not clauses:
            raise GateError(
                f"{self._quoted()} does not act on the {to} {', '.join(map(str, numbers or ()))}: "
                f"restrict it to {to} that it acts on"
            )
        return Configuration(clauses=tuple(clauses))

    def __and__(self, other: "Configuration") -> "Configuration":
        """Both at once: the gates multiply."""
        if not isinstance(other, Configuration):
            return NotImplemented
        return Configuration(clauses=self.clauses + other.clauses)

    def gate(self, site: Site, layout: HeadLayout) -> Tensor | None:
        """The gate of each head at `site`: float32 (layers, queries, heads), or (layers, 1, heads) where all
        queries have the same; None where everything is on.

        Raises GateError for layers, heads or queries that `layout` does not have, and off amounts of another
        shape.
        """
        layers = layout.layers(site)
        clauses = [clause for clause in self.clauses if clause.site == site]
        for clause in clauses:
            clause.check(layout, self._quoted())
        rows = 1 if all(clause.queries is None for clause in clauses) else layout.queries
        gate = torch.ones(layers, rows, layout.heads, dtype=torch.float64)
        for clause in clauses:
            queries = slice(None) if clause.queries is None else list(clause.queries)
            gate[:, queries] *= clause.values(layers, layout.heads)[:, None, :]
        return None if bool((gate == 1).all()) else gate.float()

    def _quoted(self) -> str:
        """For error messages, in which the name of a whole off matrix would drown the rest."""
        return f"configuration '{self.name if len(self.name) <= 60 else self.name[:57] + '...'}'"


def none_off(*, site: Site = DEFAULT_SITE) -> Configuration:
    """The baseline: everything on, at every site. (`site` is there because all constructors have it.)"""
    _site(site)
    return Configuration()


def first_off(k: int, order: Order | None = None, *, site: Site = DEFAULT_SITE) -> Configuration:
    """The first `k` heads off in all layers, counted along `order` (None: 0, 1, 2, ...).

    `order` is a permutation of the heads, or a matrix (layers, heads) of one permutation per layer.
    Raises GateError if it is neither, or shorter than `k`.
    """
    k = _number("a count of heads", k)
    rows = None if order is None else check_order(order)
    if rows is not None and k > len(rows[0]):
        raise GateError(
            f"the first {k} heads cannot be off: the order has only "
            f"{_count(len(rows[0]), 'head')}, ask for no more than that"
        )
    if rows is None or len(rows) == 1:
        configuration = heads_off(*(range(k) if rows is None else rows[0][:k]), site=site)
    else:
        # A matrix rather than a clause per layer: it is refused by a detector with another number of layers.
        configuration = off_matrix([[head in row[:k] for head in range(len(row))] for row in rows], site=site)
    place = "" if site == DEFAULT_SITE else f"{site} "
    return configuration.named(f"{place}first {k} off" if k else "none off")


def heads_off(*heads: int, layers: Iterable[int] | None = None, site: Site = DEFAULT_SITE) -> Configuration:
    """These heads off, in `layers` (None: in all). No heads: nothing off."""
    if not heads:
        return none_off(site=site)
    return Configuration(clauses=(Clause(site, layers=_numbers("layer", layers), heads=heads),))


def layers_off(*layers: int, site: Site = DEFAULT_SITE) -> Configuration:
    """All heads of these layers off. No layers: nothing off."""
    if not layers:
        return none_off(site=site)
    return Configuration(clauses=(Clause(site, layers=layers),))


def only_heads_on(
    *heads: int, layers: Iterable[int] | None = None, site: Site = DEFAULT_SITE
) -> Configuration:
    """All heads of all layers off but these ones, which stay on in `layers` (None: in all).

    No heads: everything off.
    """
    spared = (Heads(_numbers("layer", layers), heads),) if heads else ()
    return Configuration(clauses=(Clause(site, spared=spared),))


def off_vector(values: Iterable[float], *, site: Site = DEFAULT_SITE) -> Configuration:
    """One off amount per head, the same in all layers: [0, 1, 0.25, ...] has the gate [1, 0, 0.75, ...]."""
    return off_matrix([values], site=site)


def off_matrix(rows: Iterable[Iterable[float]], *, site: Site = DEFAULT_SITE) -> Configuration:
    """Off amounts (layers, heads), 0..1; a single row holds for all layers."""
    return Configuration(clauses=(Clause(site, off=_rows("off amounts", rows)),))


def cumulative(
    heads: int = 8, order: Order | None = None, *, site: Site = DEFAULT_SITE
) -> tuple[Configuration, ...]:
    """The cumulative sweep: `none off`, `first 1 off`, ..., heads + 1 configurations, along `order`."""
    if order is not None:
        check_order(order, heads)
    return tuple(first_off(k, order, site=site) for k in range(heads + 1))


def single_heads(layers: int = 6, heads: int = 8, *, site: Site = DEFAULT_SITE) -> tuple[Configuration, ...]:
    """Every head off on its own: `L0H0 off`, `L0H1 off`, ..., layers * heads configurations."""
    places = product(range(layers), range(heads))
    return tuple(heads_off(head, layers=[layer], site=site) for layer, head in places)


def all_subsets(heads: int = 8, *, site: Site = DEFAULT_SITE) -> tuple[Configuration, ...]:
    """Every set of heads off: 2^heads configurations, where head h is off if bit h of the index is set."""
    return tuple(
        heads_off(*(head for head in range(heads) if subset >> head & 1), site=site)
        for subset in range(2**heads)
    )


def check_order(order: Order, heads: int | None = None) -> tuple[tuple[int, ...], ...]:
    """The rows of an order of heads: one row for all layers, or one per layer.

    Raises GateError, with the missing or repeated head, where a row is no permutation (of `heads` heads).
    """
    rows = []
    for row in _rows("orders of heads", order):
        row = tuple(_number("a head", head) for head in row)
        wanted = range(len(row) if heads is None else heads)
        counts = Counter(row)
        faults = [f"head {head} is there {count} times" for head, count in counts.items() if count > 1]
        faults += [f"head {head} is missing" for head in wanted if not counts[head]]
        faults += [f"head {head} does not exist" for head in counts if head not in wanted]
        if faults:
            raise GateError(
                f"the order {','.join(map(str, row))} is no permutation of "
                f"{_count(len(wanted), 'head')}, {', '.join(faults)}: name each number below "
                f"{len(wanted)} once"
            )
        rows.append(row)
    return tuple(rows)


def random_order(heads: int, seed: int) -> tuple[int, ...]:
    """A random permutation of the heads, the same for the same seed on every machine."""
    # Sorted by random(), not shuffled: only random() is promised to stay the same from Python to Python.
    generator = random.Random(operator.index(seed))
    return tuple(sorted(range(heads), key=lambda _: generator.random()))


def order_by_score(
    scores: Iterable[float] | Iterable[Iterable[float]], descending: bool = True
) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """Heads sorted by score, ties by number: (heads,) scores give one order, (layers, heads) one per layer.

    Raises GateError for NaN, or for anything that is not numbers.
    """
    plain = _plain(scores)
    orders = []
    for row in _rows("scores of heads", plain):
        try:
            values = [float(value) for value in row]
        except (TypeError, ValueError):
            raise GateError(
                f"scores of heads must be numbers, (heads,) or (layers, heads): {list(row)} is neither"
            ) from None
        for head, value in enumerate(values):
            if value != value:
                raise GateError(f"the score of head {head} is NaN, which has no rank: give it a number")
        keys = [-value if descending else value for value in values]
        orders.append(tuple(sorted(range(len(keys)), key=keys.__getitem__)))
    return tuple(orders) if isinstance(plain[0], list) else orders[0]


@dataclass(frozen=True, eq=False)
class Gates:
    """A batch of C configurations for one detector.

    - `names`: C names
    - `encoder_self`, `decoder_self`, `decoder_cross`: the gates at that site, (C, layers, queries, heads), or
      (C, layers, 1, heads) where all queries have the same; float32 unless `to` changed it; None where
      everything is on

    Raises GateError for no names, or tensors of another shape.
    """

    names: tuple[str, ...]
    encoder_self: Tensor | None = None
    decoder_self: Tensor | None = None
    decoder_cross: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names:
            raise GateError(
                "a batch of gates cannot be empty: give at least one configuration, e.g. none_off()"
            )
        for site in SITES:
            gate = self.site(site)
            if gate is not None and (gate.ndim != 4 or len(gate) != len(self.names)):
                raise GateError(
                    f"the gates at {site} have the shape {tuple(gate.shape)}: it must be "
                    f"({len(self.names)}, layers, queries or 1, heads)"
                )

    def __len__(self) -> int:
        """C, the number of configurations."""
        return len(self.names)

    def site(self, name: Site) -> Tensor | None:
        """The gates at one site."""
        gate: Tensor | None = getattr(self, _site(name))
        return gate

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Gates":
        """The same gates on another device or in another dtype; None leaves either as it is."""
        return self._each(lambda gate: gate.to(device=device, dtype=dtype or gate.dtype), self.names)

    def __getitem__(self, index: "int | slice | Sequence[int] | Tensor") -> "Gates":
        """Some of the configurations, by number, slice, list or tensor of numbers, or mask; a single number
        gives a batch of one. Raises IndexError beyond the end, GateError if none is chosen."""
        everything = torch.arange(len(self))
        if isinstance(index, slice):
            chosen = torch.tensor(everything.tolist()[index], dtype=torch.long)
        else:
            which = torch.as_tensor(index, device="cpu")
            chosen = everything[which if which.numel() else which.long()].reshape(-1)
        names = tuple(self.names[i] for i in chosen.tolist())
        return self._each(lambda gate: gate[chosen.to(gate.device)], names)

    def _each(self, change: Any, names: tuple[str, ...]) -> "Gates":
        gates = (self.site(site) for site in SITES)
        return Gates(names, *(None if gate is None else change(gate) for gate in gates))


def stack(configurations: Iterable[Configuration], layout: HeadLayout) -> Gates:
    """The gates of some configurations as one batch for a detector of this `layout`.

    Raises GateError for no configurations, two of one name (their results could not be told apart), or one
    that does not fit the layout.
    """
    configurations = tuple(configurations)
    names = tuple(configuration.name for configuration in configurations)
    for name, count in Counter(names).items():
        if count > 1:
            raise GateError(
                f"{count} configurations are named '{name}': leave out all but one, or give them other names"
            )
    sites: list[Tensor | None] = []
    for site in SITES:
        gates = [configuration.gate(site, layout) for configuration in configurations]
        touched = [gate for gate in gates if gate is not None]
        if not touched:
            sites.append(None)
            continue
        rows = max(gate.shape[1] for gate in touched)
        on = torch.ones(layout.layers(site), rows, layout.heads)
        sites.append(torch.stack([on if gate is None else gate.expand_as(on) for gate in gates]))
    return Gates(names, *sites)


def _site(name: str) -> str:
    if name not in SITES:
        raise GateError(f"there is no attention site '{name}': use one of {', '.join(SITES)}")
    return name


def _number(what: str, value: Any) -> int:
    """An index or a count. `what` comes with its article: 'a head'."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number <= MAX_NUMBER:
        raise GateError(f"{what} must be a whole number from 0 to {MAX_NUMBER}: {value!r} is not")
    return number


def _numbers(what: str, values: Iterable[int] | None) -> tuple[int, ...] | None:
    """Sorted, each once."""
    if values is None:
        return None
    if isinstance(values, (str, int)):
        raise GateError(f"{what} numbers must come as a list: {values!r} is none")
    numbers = tuple(sorted({_number(f"a {what} number", value) for value in values}))
    if not numbers:
        raise GateError(f"the list of {what} numbers is empty: name at least one, or None for all")
    return numbers


def _fraction(what: str, value: Any) -> float:
    try:
        fraction = float(value)
    except (TypeError, ValueError):
        fraction = -1.0
    if not 0 <= fraction <= 1:  # NaN fails this as well
        raise GateError(f"{what} {value!r} is impossible: it must be a number from 0 to 1")
    return fraction + 0.0  # -0.0 becomes 0.0


def _plain(values: Any) -> Any:
    """Numbers in lists, out of whatever tensors, arrays and sequences they came in."""
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, Iterable) and not isinstance(values, str):
        return [_plain(value) for value in values]
    return values


def _rows(what: str, values: Any) -> tuple[tuple[Any, ...], ...]:
    """A matrix as tuples; a vector is a matrix of one row."""
    rows = _plain(values)
    if isinstance(rows, list) and not any(isinstance(row, list) for row in rows):
        rows = [rows]
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows):
        raise GateError(f"{what} must be a vector or a matrix, not {rows!r}: give one number per head")
    if len({len(row) for row in rows}) > 1:
        raise GateError(
            f"{what} are in rows of different lengths, {', '.join(str(len(row)) for row in rows)}: "
            "give one number per head in each"
        )
    return tuple(map(tuple, rows))


def _check_exist(culprit: str, noun: str, numbers: tuple[int, ...] | None, count: int, site: Site) -> None:
    missing = [str(number) for number in numbers or () if number >= count]
    if missing:
        there = f"goes from {noun} 0 to {noun} {count - 1}" if count else f"has no {noun} at all"
        raise GateError(
            f"{culprit} names {noun} {', '.join(missing)}, but at {site} this detector {there}: "
            "use a number that exists"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
