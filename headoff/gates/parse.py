"""Configurations and orders of heads from text, as the command line takes them and reports show them.

    none                        everything on: the baseline
    first 3                     heads 0, 1 and 2 off in all layers
    last 3                      the last 3 heads off in all layers
    L4H2,L5H0-3                 head 2 of layer 4, and heads 0 to 3 of layer 5, off
    H2                          head 2 off in all layers
    L0-2+5H1+3                  heads 1 and 3 off in layers 0, 1, 2 and 5
    L5                          all heads of layer 5 off;  all: all heads of all layers
    only L5H2 on                everything off but this one
    L4H2=0.5                    that head's *gate* is 0.5: its attention weights are halved
    0,1,0,1,1,0,0,0             an off vector, one *off* amount per head: heads 1, 3 and 4 off in all layers
    0,1,0.25 / 1,0,0            an off matrix, a row per layer; 0.25 off is a gate of 0.75
    query 17: L5H2              for the rows of object query 17 only;  query 3,17: for two of them
    object 0: L5H2              for the query of the image's best detection only
    layer 4-5: 0,1,0,1,1,0,0,0  in these layers only
    decoder_self L0H1           at another site; decoder_cross is the default
    query 17: L5H2; L0          several statements: their gates multiply
    edge heads = L5H2,L5H7      a name of your own

Upper and lower case are the same, and white space is ignored. Everything counts from 0. In EBNF:

    configuration = [ name, "=" ], statement, { ";", statement } ;
    name          = ? text that begins with a letter, has none of ,:;/= and is no configuration itself ? ;
    statement     = { scope }, pattern ;
    scope         = ( "query" | "queries" | "object" | "objects" | "layer" | "layers" ), numbers, ":" | site, [ ":" ] ;
    site          = "encoder_self" | "decoder_self" | "decoder_cross" ;
    pattern       = "none", [ "off" ] | ( "first" | "last" ), number, [ "off" ] | "only", selectors, "on"
                  | gated, { ",", gated } | selectors, "off" | row, { "/", row } ;
    selectors     = selector, { ",", selector } ;
    selector      = "all" | "L", numbers, [ "H", numbers ] | "H", numbers ;
    gated         = selector, [ "=", fraction ] ;
    row           = fraction, { ",", fraction } ;
    numbers       = range, { "+", range } ;    (* after "query", "object" and "layer" a "," may stand for the "+" *)
    range         = number, [ "-", number ] ;
    fraction      = ? decimal number from 0 to 1 ? ;
    number        = ? whole number from 0 to 9999 ? ;

Each kind of scope occurs at most once in a statement and applies to the whole statement, up to the ";".
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from operator import and_
from typing import NoReturn, TypeVar, cast

from headoff.choices import SITES, Site
from headoff.errors import GateError, did_you_mean
from headoff.gates.clauses import Clause, Heads
from headoff.gates.configurations import Configuration, first_off, last_off, none_off, off_matrix
from headoff.gates.orders import Order, check_order, random_order
from headoff.gates.validation import MAX_NUMBER
from headoff.wording import with_article

T = TypeVar("T")

_WORDS = ("none", "first", "last", "only", "query", "object", "layer", *SITES)
_FRACTION = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?"
_NAMED = re.compile(rf"\s*(?P<name>[^\W\d_][^,:;/=]*?)\s*=(?!\s*{_FRACTION}\s*$)", re.IGNORECASE)
"""A name and its "=", unless what follows can only be a gate."""

OrderResolver = Callable[[int], Order]
"""From the number of heads to an order of them. Raises GateError if the order is for another number of heads."""


def read_configurations(
    given: Configuration | str | Iterable[Configuration | str],
) -> tuple[Configuration, ...]:
    """One or several configurations, or their texts, as a tuple; what is given twice counts once.

    Raises:
        GateError: a text cannot be read, or nothing is given.
    """
    several = (given,) if isinstance(given, Configuration | str) else given
    if not isinstance(several, Iterable):
        raise GateError(f"{given!r} is no configuration: give texts such as 'first 3', or configurations")
    read = (one if isinstance(one, Configuration) else parse_configuration(one) for one in several)
    configurations = tuple(dict.fromkeys(read))
    if not configurations:
        raise GateError(
            "there is no configuration: give at least one, such as 'first 3', or 'none' for all heads on"
        )
    return configurations


def parse_configuration(text: str, *, name: str | None = None) -> Configuration:
    """Read a configuration from text; the notation is that of this module's docstring.

    Args:
        text: for example `L4H2,L5H0-3`.
        name: its name; by default that in the text (`edge heads = L5H2,L5H7`), or one that says what is off.

    Raises:
        GateError: the text cannot be read; the message has a caret under the character where reading stopped.

    Example:
        >>> parse_configuration("only L5H2 on").name
        'only L5H2 on'
    """
    reader = _Reader(text, "configuration")
    own_name = _own_name(reader)
    name = own_name if name is None else name
    statements = [_statement(reader)]
    while reader.take(";"):
        statements.append(_statement(reader))
    reader.end("',', ';' or the end of the text")
    configuration = reduce(and_, statements)
    return configuration.named(name) if name else configuration


def parse_order(text: str) -> OrderResolver:
    """Read an order of heads: `3,1,0,2`, such a row for each layer (`0,1/1,0`), `reverse` or `random:SEED`.

    Returns:
        A function from the number of heads to the order, as `cumulative` takes it. It raises GateError if the order
        has another length.

    Raises:
        GateError: the text cannot be read; the message has a caret under the character where reading stopped.
    """
    reader = _Reader(text, "order of heads")
    if reader.word("importance"):
        raise GateError(
            "an order by importance depends on the detector and on images: give --order importance to `headoff sweep` "
            "or `headoff evaluate`, or HeadImportance.order to headoff.cumulative"
        )
    if reader.word("reverse"):
        reader.end("the end of the text")
        return lambda heads: tuple(reversed(range(heads)))
    if reader.word("random"):
        reader.expect(":", "':' and a seed after 'random'")
        seed = reader.number("a seed after 'random:'", most=2**63)
        reader.end("the end of the text")
        return lambda heads: random_order(heads, seed)

    def row() -> list[int]:
        return _separated(
            reader, ",", lambda: reader.number("a head number, 'reverse', 'random:SEED' or 'importance'")
        )

    start = reader.here()
    rows = _separated(reader, "/", row)
    reader.end("',', '/' or the end of the text")
    with reader.errors_at(start):
        check_order(rows)

    def resolve(heads: int) -> Order:
        permutations = check_order(rows, heads)
        return permutations if len(permutations) > 1 else permutations[0]

    return resolve


class _Reader:
    """A text and the position up to which it has been read."""

    def __init__(self, text: str, what: str) -> None:
        if not isinstance(text, str):
            raise GateError(f"cannot read the {what}: it must be text, {text!r} is not")
        self.text, self.what, self.position = text.rstrip(), what, 0

    def here(self) -> int:
        """The position of the next character that is not white space."""
        while self.text[self.position : self.position + 1].isspace():
            self.position += 1
        return self.position

    def take(self, pattern: str) -> str:
        """Read the next characters, after white space, if they match; else return an empty string."""
        match = re.compile(pattern, re.IGNORECASE | re.ASCII).match(self.text, self.here())
        self.position = match.end() if match else self.position
        return match[0] if match else ""

    def next(self) -> str:
        """The next character that is not white space, in lower case, without reading it; empty at the end."""
        return self.text[self.here() : self.here() + 1].lower()

    def word(self, pattern: str) -> str:
        """`take` for a whole word, returned in lower case."""
        return self.take(rf"(?:{pattern})(?![a-z_])").lower()

    def expect(self, pattern: str, expected: str) -> str:
        return self.take(pattern) or self.fail(f"expected {expected}")

    def number(self, expected: str, most: int = MAX_NUMBER) -> int:
        digits = self.expect("[0-9]+", expected)
        if len(digits) > len(str(most)) or int(digits) > most:
            self.fail(f"expected {expected}, at most {most}", self.position - len(digits))
        return int(digits)

    def fraction(self, expected: str) -> float:
        digits = self.expect(_FRACTION, expected)
        if float(digits) > 1:
            self.fail(f"expected {expected}", self.position - len(digits))
        return float(digits)

    def end(self, expected: str) -> None:
        """Fail unless everything has been read."""
        if self.here() < len(self.text):
            self.fail(f"expected {expected}")

    @contextmanager
    def errors_at(self, position: int) -> Iterator[None]:
        """Let a GateError point at `position`: what was read there has no valid meaning."""
        try:
            yield
        except GateError as error:
            self.fail(str(error), position)

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        """Raise GateError with the caret at `position`, by default where reading stopped."""
        # One column per character, so that the caret is in the right place: no tabs, line ends or terminal codes.
        shown = "".join(character if character.isprintable() else " " for character in self.text)
        caret = " " * (self.position if position is None else position) + "^"
        raise GateError(f"cannot read the {self.what}: {message}\n    {shown}\n    {caret}") from None


def _separated(reader: _Reader, separator: str, item: Callable[[], T]) -> list[T]:
    items = [item()]
    while reader.take(separator):
        items.append(item())
    return items


def _own_name(reader: _Reader) -> str | None:
    """The name before a "="; None where there is none, or where that "=" is a gate's."""
    found = _NAMED.match(reader.text)
    if found is None:
        return None
    try:
        parse_configuration(found["name"])
    except GateError:
        reader.position = found.end()
        return found["name"]
    if re.match(r"\s*([0-9.]|$)", reader.text[found.end() :]):
        return None
    reader.fail(f"{found['name']!r} is a configuration and no name; choose another name", found.start("name"))


def _statement(reader: _Reader) -> Configuration:
    start = reader.here()
    scope: dict[str, tuple[int, ...]] = {}
    site: Site | None = None
    while word := reader.word("query|queries|objects?|layers?|" + "|".join(SITES)):
        kind = "site" if word in SITES else "query" if word == "queries" else word.removesuffix("s")
        if kind in scope or kind == "site" and site:
            reader.fail(
                f"expected one {kind} prefix only; use ';' to start another statement",
                reader.position - len(word),
            )
        if kind == "site":
            site = cast(Site, word)
            reader.take(":")
        else:
            scope[kind] = _ranges(reader, kind, f"after '{word}'", "[,+]")
            reader.expect(":", f"':' after the {kind} numbers")
    configuration = _pattern(reader)
    with reader.errors_at(start):
        if site:
            configuration = configuration.at(site)
        if "layer" in scope:
            configuration = configuration.on_layers(*scope["layer"])
        if "query" in scope:
            configuration = configuration.for_queries(*scope["query"])
        if "object" in scope:
            configuration = configuration.for_objects(*scope["object"])
    return configuration


def _pattern(reader: _Reader) -> Configuration:
    if reader.word("none"):
        reader.word("off")
        return none_off()
    if reader.word("first"):
        k = reader.number("a number of heads after 'first'")
        reader.word("off")
        return first_off(k)
    if reader.word("last"):
        k = reader.number("a number of heads after 'last'")
        reader.word("off")
        return last_off(k)
    if reader.word("only"):
        kept = _separated(reader, ",", lambda: _selector(reader))
        if not reader.word("on"):
            reader.fail("expected 'on' after the heads that stay on")
        return Configuration(clauses=(Clause(kept_heads=tuple(kept)),))
    if reader.next() in set("0123456789."):
        return _off_rows(reader)
    start = reader.here()
    word = reader.take("[a-z_]{2,}")
    if word.lower() != "all" and (guess := did_you_mean(word.lower(), _WORDS) if word else ""):
        reader.fail(f"there is no word {word!r}{guess}", start)
    reader.position = start
    if reader.next() not in set("lha"):
        reader.fail(
            "expected heads such as L4H2 or H0-3, an off vector such as 0,1,0, 'first 3', 'last 3', 'only H2 on' or "
            "'none'"
        )
    clauses = _separated(reader, ",", lambda: _gated(reader))
    if all(clause.gate == 0 for clause in clauses):
        reader.word("off")
    return Configuration(clauses=tuple(clauses))


def _off_rows(reader: _Reader) -> Configuration:
    rows: list[list[float]] = []

    def row() -> None:
        start = reader.here()
        rows.append(_separated(reader, ",", lambda: reader.fraction("an off amount from 0 to 1")))
        if len(rows[-1]) != len(rows[0]):
            reader.fail(
                f"expected {len(rows[0])} off amounts in this row, as in the first, "
                f"but it has {len(rows[-1])}",
                start,
            )

    _separated(reader, "/", row)
    return off_matrix(rows)


def _gated(reader: _Reader) -> Clause:
    where = _selector(reader)
    gate = reader.fraction("a gate from 0 (off) to 1 (on) after '='") if reader.take("=") else 0.0
    return Clause(layers=where.layers, heads=where.heads, gate=gate)


def _selector(reader: _Reader) -> Heads:
    if reader.word("all"):
        return Heads()
    layers = _ranges(reader, "layer", "after 'L'") if reader.take("L") else None
    heads = _ranges(reader, "head", "after 'H'") if reader.take("H") else None
    if layers is None and heads is None:
        reader.fail("expected heads such as L4H2, H0-3, H0+2 (several heads), L5 or all")
    return Heads(layers, heads)


def _ranges(reader: _Reader, noun: str, where: str, separator: str = r"\+") -> tuple[int, ...]:
    """Numbers and ranges of numbers, such as 0-2+5."""

    def numbers() -> range:
        first = reader.number(f"{with_article(noun)} number {where}")
        if not reader.take("-"):
            return range(first, first + 1)
        start = reader.here()
        last = reader.number(f"{with_article(noun)} number after '-'")
        if last < first:
            reader.fail(f"expected a {noun} number of at least {first} to end the range", start)
        return range(first, last + 1)

    return tuple(number for part in _separated(reader, separator, numbers) for number in part)
