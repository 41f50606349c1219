"""Relevance maps of one case, how far two implementations of it are apart, and how far apart they may be.

A case is one image under one configuration. Its truth is what the dense float64 oracle finds; a candidate is anything
else that claims to find the same. A map's error is its largest difference from the true map, relative to the true
map's peak: maps die by orders of magnitude as heads go off, and a dying map is to be right as well.

What is allowed is measured, never chosen: a small factor of the error that the oracle's own code makes on the same
case, in the candidate's dtype, on the candidate's device.
`headoff.harness.model.mutations` proves that to be little enough.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from headoff.errors import SettingError

FORMAT = "headoff relevance maps 1"
UPDATE = "pytest -k heads_off --snapshot-update"

ERROR_FACTOR = 4.0
"""A candidate's rounding errors may be this much larger than eager's: another order of the same sums."""

MOST_RAISED = 16.0
"""A second look at a map may raise what is allowed by this factor at most: to where known wrong maps still fail."""

SHOWN = 6
"""Maps that a message speaks of; what else is wrong is counted."""


@dataclass(frozen=True)
class Budget:
    """How far a candidate may be from the truth.

    - `eager_errors` (O, M): what eager attention is off by on this case, map by map
    - `eager_error`: by how much it may be off, in the candidate's dtype on the candidate's device
    - `floor`: what is allowed even where eager is exact by luck
    """

    eager_errors: NDArray[np.float64]
    eager_error: float
    floor: float

    @classmethod
    def measured(
        cls,
        eager_errors: NDArray[np.float64],
        roundings: float,
        *,
        among: float = 0.0,
        dtype: torch.dtype = torch.float32,
        measured_in: torch.dtype = torch.float32,
    ) -> Budget:
        """For a candidate in `dtype`, of errors that eager makes in `measured_in`.

        Rounding errors are proportional to the unit that is rounded to. That carries errors measured in float32 over to
        float64, where two machines' truths differ and nothing finer is there to measure it with.

        Args:
            eager_errors: (O, M), as `map_errors` gives them.
            roundings: attention layers that a map comes through. Each rounds at least once, so that nobody can be
                asked to be closer than that many units.
            among: the largest error of eager in cases like this one. That of one case may be small by luck.
        """
        unit = torch.finfo(dtype).eps
        largest = max(among, float(eager_errors.max(initial=0.0)))
        return cls(eager_errors, largest * unit / torch.finfo(measured_in).eps, roundings * unit)

    @property
    def allowed(self) -> float:
        return ERROR_FACTOR * self.eager_error + self.floor

    @property
    def limit(self) -> float:
        """What `allowed` is never raised beyond."""
        return MOST_RAISED * self.allowed

    def raised(self, eager_error: float) -> Budget:
        """For a map that eager was found to be off by so much."""
        within = min(eager_error, (self.limit - self.floor) / ERROR_FACTOR)
        return replace(self, eager_error=max(self.eager_error, within))


@dataclass(frozen=True, eq=False)
class CaseMaps:
    """Relevance maps of one case, as one implementation found them.

    - `case`: for people, as `scene-003, first 3 off`
    - `maps` (O, M, h, w): of O objects, after each of M decoder layers
    - `objects`: O names of what is explained, for people and to be compared
    - `inputs`: what the maps were made of, each by a text that changes with it (a hash of a file, a setting)
    - `budget`: how far others may be from these where they are the candidate's, what eager is off by where the truth's
    - `found_by`: the implementation, for people
    """

    case: str
    maps: NDArray[np.float64]
    objects: tuple[str, ...]
    inputs: Mapping[str, str]
    budget: Budget
    found_by: str = field(default="the float64 oracle")

    def __post_init__(self) -> None:
        objects, layers = len(self.objects), self.maps.shape[1:2]
        if (
            self.maps.ndim != 4
            or len(self.maps) != objects
            or self.budget.eager_errors.shape != (objects, *layers)
        ):
            raise SettingError(
                f"maps of shape {self.maps.shape} do not go with {objects} objects and errors of shape "
                f"{self.budget.eager_errors.shape}: give (objects, layers, h, w) and (objects, layers)"
            )

    def to_bytes(self) -> bytes:
        """A compressed npz. Nothing is rounded: truth is to be finer than all that is compared with it."""
        about = {
            "format": FORMAT,
            "case": self.case,
            "found_by": self.found_by,
            "objects": list(self.objects),
            "inputs": dict(self.inputs),
            "axes": {"maps": ["object", "layer", "row", "column"], "eager_errors": ["object", "layer"]},
            "budget": {"eager_error": self.budget.eager_error, "floor": self.budget.floor},
        }
        file = io.BytesIO()
        np.savez_compressed(
            file,
            about=np.array(json.dumps(about)),
            maps=np.asarray(self.maps, np.float64),
            eager_errors=np.asarray(self.budget.eager_errors, np.float64),
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> CaseMaps:
        """Raises SettingError for anything that `to_bytes` did not write."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                about = json.loads(str(archive["about"]))
                if about["format"] != FORMAT:
                    raise ValueError(f"its format is {about['format']!r}")
                return cls(
                    case=about["case"],
                    maps=archive["maps"],
                    objects=tuple(about["objects"]),
                    inputs=about["inputs"],
                    budget=Budget(archive["eager_errors"], **about["budget"]),
                    found_by=about["found_by"],
                )
        except Exception as error:
            raise SettingError(
                f"the golden file cannot be read ({' '.join(str(error).split())}): run `{UPDATE}`"
            ) from error


def map_errors(truth: NDArray[np.float64], found: NDArray[np.floating]) -> NDArray[np.float64]:
    """Largest difference in each map, relative to the true map's peak: (...) of maps (..., h, w).

    A map that is truly zero must be found exactly zero: its error is infinite otherwise. So is that of a map that
    is not finite.
    """
    difference = np.abs(np.asarray(found, np.float64) - truth).max((-2, -1))
    peak = np.abs(truth).max((-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.where(difference == 0, 0.0, difference / peak)
    return np.where(np.isfinite(errors), errors, np.inf)


def stale(expected: CaseMaps, inputs: Mapping[str, str], objects: tuple[str, ...]) -> list[str]:
    """Where `expected` is about something else than these, a sentence each: maps cannot be compared then."""
    problems = []
    for name in sorted(expected.inputs.keys() | inputs.keys()):
        then, now = expected.inputs.get(name, "none"), inputs.get(name, "none")
        if then != now:
            problems.append(
                f"{expected.case}: golden made with other {name} ({_short(then)}, now {_short(now)}): run `{UPDATE}`"
            )
    if not problems and expected.objects != objects:
        problems.append(
            f"{expected.case}: explained are {', '.join(objects)}, expected {', '.join(expected.objects)}"
        )
    return problems


def incomparable(expected: CaseMaps, found: CaseMaps) -> list[str]:
    """Where the two are not about the same thing, a sentence each."""
    problems = stale(expected, found.inputs, found.objects)
    if not problems and expected.maps.shape != found.maps.shape:
        problems.append(f"{found.case}: maps are of shape {found.maps.shape}, expected {expected.maps.shape}")
    return problems


def mismatches(expected: CaseMaps, found: CaseMaps) -> list[str]:
    """What differs by more than `found` may, a sentence each; none where the maps are right."""
    if problems := incomparable(expected, found):
        return problems
    allowed = found.budget.allowed
    errors = map_errors(expected.maps, found.maps)
    wrong = [(o, m) for o, m in zip(*np.nonzero(errors > allowed), strict=True)]
    if not wrong:
        return []
    wrong.sort(key=lambda at: -errors[at])
    problems = [
        f"{found.case}: {len(wrong)} of {errors.size} maps by {found.found_by} are not the expected ones",
        *(_describe(expected, found, errors, at) for at in wrong[:SHOWN]),
    ]
    if len(wrong) > SHOWN:
        problems.append(f"  and {len(wrong) - SHOWN} more")
    budget = found.budget
    problems.append(
        f"allowed are {allowed:.1e} of a map's peak: {ERROR_FACTOR:g} times the {budget.eager_error:.1e} that eager "
        f"attention is off by, plus {budget.floor:.1e}"
    )
    return problems


def worst_map(expected: CaseMaps, found: CaseMaps) -> tuple[int, int]:
    """(object, layer) of the largest error, of two that can be compared."""
    errors = map_errors(expected.maps, found.maps)
    place = np.unravel_index(errors.argmax(), errors.shape)
    return int(place[0]), int(place[1])


def _describe(expected: CaseMaps, found: CaseMaps, errors: NDArray[np.float64], at: tuple[int, int]) -> str:
    truth, got = expected.maps[at], found.maps[at]
    where = f"  {expected.objects[at[0]]}, after layer {at[1]}:"
    if not np.isfinite(got).all():
        return f"{where} {int((~np.isfinite(got)).sum())} of {got.size} numbers are NaN or infinite"
    row, column = np.unravel_index(np.abs(got - truth).argmax(), truth.shape)
    masses = f"mass {got.sum():.6g}, expected {truth.sum():.6g}"
    if not truth.any():
        return f"{where} not zero, {got[row, column]:.3e} at token ({row}, {column}); {masses}"
    return (
        f"{where} off by {errors[at]:.1e} of the peak, at token ({row}, {column}) {got[row, column]:.6e}, "
        f"expected {truth[row, column]:.6e}; {masses}"
    )


def _short(text: str) -> str:
    """The beginning of a hash, all of anything else."""
    return f"sha256 {text[:12]}" if len(text) == 64 else text
