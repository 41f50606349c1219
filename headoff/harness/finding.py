"""What a check found wrong with an attention: a record that a test fails with, and that reports are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import pytest

if TYPE_CHECKING:
    from headoff.gates import Site

Property = Literal[
    "gate",  # the head gate: ignored, on other heads or rows, renormalised, before softmax
    "mask",  # the attention mask: ignored, inverted, of another batch item, wrong for rows without keys
    "scale",  # the factor 1 / sqrt(D)
    "sampling",  # deformable: where values are read, positions and borders
    "levels",  # deformable: where a level begins, its size, levels left out
    "weights",  # deformable: the attention weights: ignored, normalised again, of another point
    "softmax",  # the weights themselves: overflow, an approximate exponential, no normalisation
    "sizes",  # the rest of a block, one query, one key, other numbers of heads or channels
    "context",  # the forward pass, in a way that none of the above explains
    "dq",  # the gradient of the query
    "dk",  # the gradient of the key
    "dv",  # the gradient of the value
    "dlocations",  # the gradient of the sampling locations
    "dweights",  # the gradient of the attention weights
    "softmax backward",  # gradients of query and key together
    "precision",  # errors much larger than the dtype's
    "dtype",  # the context's dtype
    "shape",  # the context's shape
    "layout",  # strides: of inputs not respected, of the context not usable
    "state",  # something carried from call to call, or left behind
    "randomness",  # other numbers for the same inputs
    "in-place",  # inputs modified
    "crash",  # an exception
    "calls",  # never called, or something else computed in its place
    "timing",  # what was timed is not the work: remembered, late, elsewhere, or the clock was changed
    "compile",  # under torch.compile
    "opcheck",  # its registration as a custom operator
    "export",  # under torch.export
    "autocast",  # under torch.autocast
    "threads",  # called from several threads at once
    "streams",  # on several CUDA streams at once
    "graph",  # replayed from a CUDA graph
    "sanitizer",  # memory accesses out of bounds
    "vmap",  # under torch.func.vmap
    "detections",  # logits, boxes or detections
    "relevance",  # relevance maps
    "gradients",  # end-to-end gradients through the model
    "time",  # slower than is allowed
]
PROPERTIES: tuple[str, ...] = get_args(Property)


@dataclass(frozen=True)
class Finding:
    """One way in which an attention is wrong.

    - `property`: which of its properties, as far as this check can tell
    - `message`: a sentence for people, with error, budget and place
    - `case`: what was tried, for people
    - `error`, `budget`: what was measured and what is allowed, in the same unit
    - `site`, `layer`, `head`, `configuration`: where in the model, as far as that is known
    - `pictures`: paths of PNG files
    """

    property: Property
    message: str
    case: str = ""
    error: float | None = None
    budget: float | None = None
    site: Site | None = None
    layer: int | None = None
    head: int | None = None
    configuration: str | None = None
    pictures: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Of types that JSON knows; an infinite error is None, for JSON has no word for it."""
        record = {**asdict(self), "pictures": list(self.pictures)}
        return {name: None if _is_infinite(value) else value for name, value in record.items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Finding:
        """What `as_dict` gave."""
        return cls(**{**record, "pictures": tuple(record["pictures"])})


def _is_infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class WrongAttention(pytest.fail.Exception):  # type: ignore[name-defined]
    """A test's failure that says what is wrong with the attention under test; shown without a traceback."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__(
            "\n".join(f"{finding.property}: {finding.message}" for finding in findings), pytrace=False
        )


def fail_on(findings: Sequence[Finding]) -> None:
    """Fail the test with `findings`, unless there are none.

    The only way to say that the attention under test is wrong: a test that fails by anything else, or that never
    called the attention, ends the run without a verdict.
    """
    __tracebackhide__ = True
    if findings:
        raise WrongAttention(findings)
