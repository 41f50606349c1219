"""What curves of `headoff.faithfulness` cost, relative to one plain forward pass of the detector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from headoff.bench.cases import Case, Provider
from headoff.bench.importance import OBJECTS, confidence_of_objects
from headoff.bench.models import BenchmarkModel, Size, with_attention
from headoff.faithfulness import ExplainedImage, Perturbation
from headoff.faithfulness.perturbation import (
    PixelPerturber,
    TokenPerturber,
    counts_of_cells,
    kept_cells,
    order_of_cells,
)
from headoff.timing import TimedCall

TOLERANCE = 1e-4
"""Of probabilities in float32."""

_CHECKED = 7
"""One in so many changed images is compared with float64."""


def faithfulness_cases(size: Size, model: BenchmarkModel, one_forward: Provider) -> Iterator[Case]:
    """One case with deletion curves by every fill of tokens, and with one of pixels for the bundled detector.

    Cells are in a random order, as maps are no part of what is timed; the image is encoded before.
    """

    def providers() -> list[Provider]:
        confidence = confidence_of_objects(model)
        image = _image(model, confidence)
        exact = _image(model.in_dtype(torch.float64), confidence)
        kept = _kept(image)
        fills = [("tokens", fill) for fill in ("removed", "zero", "mean")]
        if size == "scenes":
            fills.append(("pixels", "grey"))
        found = [one_forward]
        for place, fill in fills:
            perturber = TokenPerturber if place == "tokens" else PixelPerturber
            reference = partial(_exact_values, perturber(exact, fill), kept)
            found.append(
                Provider.of(
                    f"{place} {fill}",
                    TimedCall(partial(perturber(image, fill), kept)),
                    partial(_check, reference),
                    f"{len(kept):,} images, of which {_distinct(kept):,} differ",
                )
            )
        return found

    measure = Perturbation("tokens", "removed")
    title = f"{model.name}, deletion curves of {measure.steps} steps, {OBJECTS} objects"
    yield Case("faithfulness", title, providers, {one_forward.name})


def _image(model: BenchmarkModel, confidence: float) -> ExplainedImage:
    return ExplainedImage.of(with_attention(model.detector, "sdpa"), model.image, confidence=confidence)


def _kept(image: ExplainedImage) -> Tensor:
    """(P, N) the cells that the points of all objects' deletion curves keep."""
    maps = image.maps("random").flatten(1)
    counts = counts_of_cells(Perturbation("tokens", "removed").points, maps.shape[-1])
    return kept_cells(order_of_cells(maps, image.generator("ties")), counts)[:, 0].flatten(0, 1)


def _distinct(kept: Tensor) -> int:
    return len(torch.unique(kept, dim=0))


def _exact_values(perturber: TokenPerturber | PixelPerturber, kept: Tensor) -> Tensor:
    return perturber(kept[::_CHECKED])[..., 0]


def _check(reference: Callable[[], Tensor], found: Tensor) -> str | None:
    """Class probabilities against float64."""
    error = float((found[::_CHECKED, :, 0] - reference()).abs().max())
    if not error <= TOLERANCE:
        return f"probabilities differ from those in float64 by {error:.1e}"
    return None
