"""Clauses: statements about the gates of some heads at one attention site."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headoff.choices import DEFAULT_SITE, SITES, Site
from headoff.errors import GateError
from headoff.gates.validation import check_exist, check_site, fraction, number, numbers
from headoff.wording import counted


@dataclass(frozen=True)
class HeadLayout:
    """The numbers of layers, heads and queries of a detector. The defaults are DETR's.

    Attributes:
        encoder_layers, decoder_layers: layers; 0 encoder layers if no self-attention precedes the decoder.
        heads: heads of the decoder's cross-attention.
        queries: object queries.
        encoder_heads, self_heads: heads of the encoder's and the decoder's self-attention; as many as `heads` by
            default.
    """

    encoder_layers: int = 6
    decoder_layers: int = 6
    heads: int = 8
    queries: int = 100
    encoder_heads: int | None = None
    self_heads: int | None = None

    def heads_at(self, site: Site) -> int:
        """The number of heads of the attention at `site`."""
        at = {"encoder_self": self.encoder_heads, "decoder_self": self.self_heads}.get(check_site(site))
        return self.heads if at is None else at

    @property
    def heads_text(self) -> str:
        """The numbers of heads, for people."""
        by_site = {site: self.heads_at(site) for site in SITES if self.layers(site)}
        if len(set(by_site.values())) == 1:
            return f"{self.heads} in each layer"
        return ", ".join(f"{heads} in each layer of {site}" for site, heads in by_site.items())

    def layers(self, site: Site) -> int:
        """The number of layers that have attention at `site`."""
        return self.encoder_layers if check_site(site) == "encoder_self" else self.decoder_layers


def check_site_exists(layout: HeadLayout, site: Site, subject: str) -> None:
    """Raise GateError, with `subject` as the subject of its sentence, if `layout` has no layers at `site`."""
    if not layout.layers(site):
        present = [other for other in SITES if layout.layers(other)]
        raise GateError(
            f"{subject} names {site}, where this detector has no attention: use {' or '.join(present)}"
        )


@dataclass(frozen=True)
class Heads:
    """Some heads of some layers; None means all of them. Numbers are kept sorted and without duplicates."""

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", numbers("layer", self.layers))
        object.__setattr__(self, "heads", numbers("head", self.heads))

    def mask(self, layers: int, heads: int) -> Tensor:
        """bool (layers, heads), True for these heads."""
        mask = torch.zeros(layers, heads, dtype=torch.bool)
        rows = list(range(layers) if self.layers is None else self.layers)
        columns = list(range(heads) if self.heads is None else self.heads)
        # Index tensors broadcast, so that each row meets each column; an empty list would have no integer dtype.
        mask[torch.tensor(rows, dtype=torch.long)[:, None], torch.tensor(columns, dtype=torch.long)] = True
        return mask

    def sort_key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """For a canonical order."""
        return self.layers or (), self.heads or ()


@dataclass(frozen=True)
class Clause:
    """A statement about the heads of one site, in one of four forms.

    - `heads` of `layers` have the gate `gate`: `Clause(layers=(4,), heads=(2,))` switches L4H2 off.
    - `kept_heads`: every head of `layers` is off except these: `Clause(kept_heads=(Heads((5,), (2,)),))`.
    - `last`: the last heads of `layers` are off, however many heads a layer has: `Clause(last=3)`.
    - `off`: off amounts, one row for all `layers`, or one row for each layer of the site, of which only the rows of
      `layers` are used: `Clause(off=((0, 1, 0, 1, 1, 0, 0, 0),))`.

    `layers`, `heads` and `queries` of None mean all. Heads that the clause does not mention keep the gate 1.
    `objects`, instead of `queries`, are detections with nothing off, by falling score from 0: `headoff.sweep` and
    `headoff.explain` replace them by the queries that detected them in their image.

    Raises:
        GateError: an unknown site, numbers that are not indices, values outside 0..1, or mixed forms.
    """

    site: Site = DEFAULT_SITE
    queries: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    gate: float = 0.0
    kept_heads: tuple[Heads, ...] = ()
    off: tuple[tuple[float, ...], ...] | None = None
    last: int | None = None
    objects: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_site(self.site)
        # Everything is normalised, so that clauses which mean the same compare equal.
        normalise = object.__setattr__
        normalise(self, "queries", numbers("query", self.queries))
        normalise(self, "objects", numbers("object", self.objects))
        normalise(self, "layers", numbers("layer", self.layers))
        normalise(self, "heads", numbers("head", self.heads))
        normalise(self, "gate", fraction("the gate", self.gate))
        normalise(self, "kept_heads", tuple(sorted(set(self.kept_heads), key=Heads.sort_key)))
        if self.off is not None:
            rows = tuple(tuple(fraction("the off amount", value) for value in row) for row in self.off)
            normalise(self, "off", rows)
            if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
                raise GateError(
                    "the rows of off amounts must be equally long and not empty: "
                    f"give one value per head, not rows of {[len(row) for row in rows]}"
                )
        if self.last is not None and not number("a count of last heads", self.last):
            raise GateError("a clause cannot be about the last 0 heads: leave it out")
        named = self.heads is not None or self.gate != 0
        if named + bool(self.kept_heads) + (self.off is not None) + (self.last is not None) > 1:
            raise GateError(
                "a clause has either heads with a gate, or kept heads, or last heads, or off amounts: "
                "combine several clauses with '&' instead"
            )
        if self.queries is not None and self.objects is not None:
            raise GateError("a clause is about queries or about objects: name one of the two")
        if (self.queries or self.objects) is not None and self.site == "encoder_self":
            raise GateError(
                "encoder_self has no object queries, its rows are image tokens: "
                "drop the query numbers or use decoder_self or decoder_cross"
            )

    def values(self, layers: int, heads: int) -> Tensor:
        """The gate of each head for the clause's queries: float64 (layers, heads)."""
        chosen = self.heads if self.last is None else tuple(range(heads - self.last, heads))
        affected = Heads(self.layers, chosen).mask(layers, heads)
        for kept in self.kept_heads:
            affected &= ~kept.mask(layers, heads)
        if self.off is None:
            gate = torch.tensor(self.gate, dtype=torch.float64)
        else:
            gate = 1 - torch.tensor(self.off, dtype=torch.float64)
        return torch.where(affected, gate, 1.0)

    def check(self, layout: HeadLayout, subject: str) -> None:
        """Raise GateError, with `subject` as the subject of its sentence, if `layout` lacks a head, layer or query."""
        check_site_exists(layout, self.site, subject)
        layers, heads = layout.layers(self.site), layout.heads_at(self.site)
        for where in (Heads(self.layers, self.heads), *self.kept_heads):
            check_exist(subject, "layer", where.layers, layers, self.site)
            check_exist(subject, "head", where.heads, heads, self.site)
        check_exist(subject, "query", self.queries, layout.queries, self.site)
        if self.last is not None and self.last > heads:
            raise GateError(
                f"{subject} names the last {self.last} heads, but this detector has {heads} at {self.site}: "
                "name no more than that"
            )
        if self.off is not None and len(self.off[0]) != heads:
            raise GateError(
                f"{subject} has off amounts for {counted(len(self.off[0]), 'head')}, "
                f"but this detector has {heads} at {self.site}: give one per head"
            )
        if self.off is not None and len(self.off) not in (1, layers):
            raise GateError(
                f"{subject} has an off matrix of {len(self.off)} rows, but this detector "
                f"has {counted(layers, 'layer')} at {self.site}: give one row per layer"
            )

    def sort_key(self) -> tuple[Any, ...]:
        """For a canonical order: the most general clauses first, clauses of one form next to each other."""
        form = bool(self.kept_heads), self.off or (), self.last or 0
        kept = [heads.sort_key() for heads in self.kept_heads]
        return (
            SITES.index(self.site),
            self.queries or (),
            self.objects or (),
            form,
            self.layers or (),
            self.heads or (),
            self.gate,
            kept,
        )
