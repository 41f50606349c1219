"""Orders of heads, along which a cumulative sweep switches them off."""

import operator
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from torch import Tensor

from headoff.errors import GateError
from headoff.gates.validation import matrix, number, plain
from headoff.wording import counted

Order: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | Tensor
"""A permutation of the heads for all layers, or a matrix (layers, heads) with a permutation for each layer."""


def check_order(order: Order, heads: int | None = None) -> tuple[tuple[int, ...], ...]:
    """The rows of an order of heads: one row for all layers, or one per layer.

    Args:
        order: a vector or a matrix.
        heads: number of heads; as many as the row is long if None.

    Raises:
        GateError: a row is not a permutation; the message names the missing or repeated heads.
    """
    rows = []
    for row in matrix("orders of heads", order):
        row = tuple(number("a head", head) for head in row)
        wanted = range(len(row) if heads is None else heads)
        counts = Counter(row)
        faults = [f"head {head} is named {count} times" for head, count in counts.items() if count > 1]
        faults += [f"head {head} is missing" for head in wanted if not counts[head]]
        faults += [f"head {head} does not exist" for head in counts if head not in wanted]
        if faults:
            raise GateError(
                f"the order {','.join(map(str, row))} is no permutation of "
                f"{counted(len(wanted), 'head')}, {', '.join(faults)}: name each number below "
                f"{len(wanted)} once"
            )
        rows.append(row)
    return tuple(rows)


def random_order(heads: int, seed: int) -> tuple[int, ...]:
    """A random permutation of the heads, the same for the same seed on every machine."""
    # Sorted by random() rather than shuffled: of the two, only random() is the same in all versions of Python.
    generator = random.Random(operator.index(seed))
    return tuple(sorted(range(heads), key=lambda _: generator.random()))


def order_by_score(
    scores: Iterable[float] | Iterable[Iterable[float]], descending: bool = True
) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """Heads sorted by score; heads of equal score by their number.

    Args:
        scores: (heads,) for one order, or (layers, heads) for an order per layer.
        descending: the highest score first.

    Raises:
        GateError: a score is NaN or not a number.
    """
    values_given = plain(scores)
    orders = []
    for row in matrix("scores of heads", values_given):
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
    return tuple(orders) if isinstance(values_given[0], list) else orders[0]
