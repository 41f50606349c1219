"""Targets: the scalar of a detector's output that is explained, and the query whose row of the relevance is the map.

A target is a function of one configuration's `logits` (Q, K + 1) and `boxes` (Q, 4; centre x, centre y, width, height
as fractions of the image). Class logits and box coordinates have names; any other function is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from headoff.choices import BOX_COORDINATES
from headoff.errors import SettingError, did_you_mean
from headoff.values import Scalar

TargetSpec = str | Scalar
"""`"class"`, one of `BOX_COORDINATES`, or a function of (logits, boxes) that returns a scalar tensor."""


@dataclass(frozen=True)
class Target:
    """A scalar to explain.

    Attributes:
        query: the row of R_qi that is the map.
        name: for people.
        function: computes the scalar from logits (Q, K + 1) and boxes (Q, 4).
        label: the class whose logit the scalar is; None for any other scalar.
        box: of the object, (left, top, right, bottom) as fractions of the image; None if that is the box of `query`.
    """

    query: int
    name: str
    function: Scalar
    label: int | None = None
    box: tuple[float, float, float, float] | None = None

    def value(self, logits: Tensor, boxes: Tensor) -> Tensor:
        """The scalar, a tensor without dimensions.

        Raises:
            SettingError: the function returns no scalar tensor that can be differentiated.
        """
        value = self.function(logits, boxes)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise SettingError(
                f"the target {self.name!r} must be one number computed from logits or boxes by torch: "
                "return a tensor of one element that can be differentiated"
            )
        return value.reshape(())


def class_logit(query: int, label: int) -> Target:
    """The logit of class `label` at `query`."""
    return Target(query, f"class {label}", lambda logits, _: logits[query, label], label)


def box_coordinate(query: int, name: str) -> Target:
    """A coordinate of the box of `query`: one of `BOX_COORDINATES`."""
    column = BOX_COORDINATES.index(name)
    return Target(query, name, lambda _, boxes: boxes[query, column])


def make_target(spec: TargetSpec, query: int, label: int) -> Target:
    """The target that `spec` names, for `query` and the class `label`.

    Raises:
        SettingError: the name is unknown.
    """
    if callable(spec):
        return Target(query, getattr(spec, "__name__", type(spec).__name__), spec)
    if spec == "class":
        return class_logit(query, label)
    if spec in BOX_COORDINATES:
        return box_coordinate(query, spec)
    names = ("class", *BOX_COORDINATES)
    raise SettingError(
        f"there is no target {spec!r}{did_you_mean(spec, names)}: use one of "
        f"{', '.join(names)}, or a function of (logits, boxes)"
    )
