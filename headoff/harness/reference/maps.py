"""Relevance maps of one case: how far two implementations' maps are apart, and the golden file that holds them.

A case is one image under one configuration. The expected maps are those of the dense float64 oracle. A map's error is
its largest difference from the expected map, relative to that map's peak: maps fade by orders of magnitude as heads go
off, and a faint map has to be right as well.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from headoff.errors import SettingError
from headoff.harness.tolerance import Tolerance, peak_error

FORMAT = "headoff relevance maps 1"
UPDATE = "pytest -k heads_off --snapshot-update"

SHOWN = 6
"""Maps that a message describes; how many more are wrong is counted."""


@dataclass(frozen=True, eq=False)
class CaseMaps:
    """Relevance maps of one case, as one implementation computed them.

    Args:
        case: for people, as `scene-003, first 3 off`.
        maps: (O, M, h, w), of O objects after each of M decoder layers.
        objects: O names of what is explained, to be shown and compared.
        inputs: what the maps depend on; each entry is a text that changes with it (a hash of a file, a setting).
        tolerance: what these may be off by when they are the candidate's.
        found_by: the implementation, for people.
    """

    case: str
    maps: NDArray[np.float64]
    objects: tuple[str, ...]
    inputs: Mapping[str, str]
    tolerance: Tolerance
    found_by: str = "the float64 oracle"

    def __post_init__(self) -> None:
        if self.maps.ndim != 4 or len(self.maps) != len(self.objects):
            raise SettingError(
                f"maps of shape {self.maps.shape} do not fit {len(self.objects)} objects: "
                "give (objects, layers, h, w)"
            )

    def to_bytes(self) -> bytes:
        """A compressed npz. Nothing is rounded: expected maps are finer than all that is compared with them."""
        about = {
            "format": FORMAT,
            "case": self.case,
            "found_by": self.found_by,
            "objects": list(self.objects),
            "inputs": dict(self.inputs),
            "axes": {"maps": ["object", "layer", "row", "column"]},
            "budget": {"eager_error": self.tolerance.measured, "floor": self.tolerance.floor},
        }
        file = io.BytesIO()
        np.savez_compressed(file, about=np.array(json.dumps(about)), maps=np.asarray(self.maps, np.float64))
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
                    tolerance=Tolerance(about["budget"]["eager_error"], about["budget"]["floor"]),
                    found_by=about["found_by"],
                )
        except Exception as error:
            raise SettingError(
                f"the golden file cannot be read ({' '.join(str(error).split())}): run `{UPDATE}`"
            ) from error


def map_errors(expected: NDArray[np.float64], found: NDArray[np.floating]) -> NDArray[np.float64]:
    """The largest difference in each map, relative to the expected map's peak: (...) of maps (..., h, w)."""
    return peak_error(torch.from_numpy(found), torch.from_numpy(expected), (-2, -1)).numpy()


def map_tolerance(
    errors: NDArray[np.float64], roundings: float, dtype: torch.dtype, measured_in: torch.dtype | None = None
) -> Tolerance:
    """For candidates in `dtype`.

    Args:
        errors: of right implementations, as `map_errors` gives them.
        roundings: rounding errors of all attention layers that a map passes through, in units of eps: no implementation
            can be closer than that.
        measured_in: the dtype that `errors` were measured in, if another. Rounding errors are proportional to eps, so
            errors in float32 say what another machine's float64 may be off by, where nothing finer can measure it.
    """
    unit = torch.finfo(dtype).eps
    return Tolerance(
        float(errors.max(initial=0.0)) * unit / torch.finfo(measured_in or dtype).eps, roundings * unit
    )


def stale(expected: CaseMaps, inputs: Mapping[str, str], objects: tuple[str, ...]) -> list[str]:
    """Where `expected` is about something other than these, a sentence each: maps cannot be compared then."""
    problems = []
    for name in sorted(expected.inputs.keys() | inputs.keys()):
        then, now = expected.inputs.get(name, "none"), inputs.get(name, "none")
        if then != now:
            problems.append(
                f"{expected.case}: golden made with other {name} ({_short(then)}, now {_short(now)}): run `{UPDATE}`"
            )
    if not problems and expected.objects != objects:
        problems.append(
            f"{expected.case}: explained are {', '.join(objects)}, expected {', '.join(expected.objects)}: "
            f"run `{UPDATE}`"
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
    errors = map_errors(expected.maps, found.maps)
    wrong = list(zip(*np.nonzero(errors > found.tolerance.allowed), strict=True))
    if not wrong:
        return []
    wrong.sort(key=lambda at: -errors[at])
    problems = [
        f"{found.case}: {len(wrong)} of {errors.size} maps by {found.found_by} are not the expected ones",
        *(_describe(expected, found, errors, at) for at in wrong[:SHOWN]),
    ]
    if len(wrong) > SHOWN:
        problems.append(f"  and {len(wrong) - SHOWN} more")
    return [*problems, f"allowed of a map's peak are {found.tolerance}"]


def worst_map(expected: CaseMaps, found: CaseMaps) -> tuple[int, int]:
    """(object, layer) of the largest error, of two that can be compared."""
    errors = map_errors(expected.maps, found.maps)
    place = np.unravel_index(errors.argmax(), errors.shape)
    return int(place[0]), int(place[1])


def _describe(expected: CaseMaps, found: CaseMaps, errors: NDArray[np.float64], at: tuple[int, int]) -> str:
    true, got = expected.maps[at], found.maps[at]
    where = f"  {expected.objects[at[0]]}, after layer {at[1]}:"
    if not np.isfinite(got).all():
        return f"{where} {int((~np.isfinite(got)).sum())} of {got.size} numbers are NaN or infinite"
    row, column = np.unravel_index(np.abs(got - true).argmax(), true.shape)
    masses = f"mass {got.sum():.6g}, expected {true.sum():.6g}"
    if not true.any():
        return f"{where} not zero, {got[row, column]:.3e} at token ({row}, {column}); {masses}"
    return (
        f"{where} off by {errors[at]:.1e} of the peak, at token ({row}, {column}) {got[row, column]:.6e}, "
        f"expected {true[row, column]:.6e}; {masses}"
    )


def _short(text: str) -> str:
    """The beginning of a hash, all of anything else."""
    return f"sha256 {text[:12]}" if len(text) == 64 else text
