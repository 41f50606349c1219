"""An explanation as compact data for the page, whose script lets the reader choose scale and colours.

A map is stored as a byte per token between its minimum and its maximum, which are stored with it. So a map that is
faint on the scale of the sweep has all its shades when it is drawn on its own scale.
"""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headoff.figures.colouring import SMOOTHING, MapStyle
from headoff.figures.object_views import object_views
from headoff.figures.relevance import grid_span
from headoff.relevance.explanations import Explanation
from headoff.sweeps import SweepResult

MOST_BYTES = 8 * 2**20
"""Most bytes of maps on a page. Above that the heads' attention is left out, then the last configurations."""


def page_maps(
    explanation: Explanation,
    result: SweepResult,
    style: MapStyle,
    frames: Sequence[int | None],
    others: Sequence[Explanation] = (),
) -> dict[str, Any]:
    """The data for the page's script.

    Args:
        explanation: the maps.
        result: the sweep, for its baseline and confidence.
        style: the initial choice of scale and colours.
        frames: for every picture of the page, the configuration's index in `explanation`.
        others: maps of the same by other methods.
    """
    methods = explanation, *others
    size = max(sum(one.maps.numel() for one in methods), 1)
    heads: list[tuple[str, Tensor]] = []
    if explanation.heads is not None and explanation.heads.numel() + size <= MOST_BYTES:
        heads = [(f"head {head}", maps) for head, maps in enumerate(explanation.heads.unbind(3))]
    # As many of the first configurations as fit, but at least one.
    count = min(len(explanation), max(1, MOST_BYTES * len(explanation) // size))
    views = [
        object_views(explanation, index, baseline=result.baseline, confidence=result.confidence)
        for index in range(count)
    ]
    rows, columns = explanation.grid
    return {
        "rows": rows,
        "columns": columns,
        "span": grid_span(explanation),
        "layers": explanation.layers,
        "objects": [
            {"colour": view.colour, "first": rounded(view.first_box), "score": short(view.first_score)}
            for view in (views[0] if views else ())
        ],
        "configurations": [
            {
                "objects": [
                    {
                        "name": view.name,
                        "query": view.query,
                        "score": None if view.score is None else short(view.score),
                        "box": None if view.box is None else rounded(view.box),
                    }
                    for view in views[index]
                ]
            }
            for index in range(count)
        ],
        "frames": [None if index is None or index >= count else index for index in frames],
        # Channels of a group share a scale: methods have units of their own, heads have one.
        "channels": [
            {
                "name": one.method,
                "group": group,
                "method": True,
                "masses": rounded(one.masses[:count].tolist()),
                "shares": rounded(one.box_shares[:count].tolist()),
                **packed(one.maps[:count]),
            }
            for group, one in enumerate(methods)
        ]
        + [
            {"name": name, "group": len(methods), "method": False, **packed(maps[:count])}
            for name, maps in heads
        ],
        "colours": {
            name: _base64(replace(style, overlay=overlay).colours.tobytes())
            for name, overlay in (("plain", False), ("overlay", True))
        },
        "smoothing": SMOOTHING,
        "scale": style.scale,
        "overlay": style.overlay,
        "smooth": style.smooth,
    }


def as_script(data: dict[str, Any]) -> str:
    """JSON that cannot end the <script> element that it is in, whatever names it contains."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def packed(maps: Tensor) -> dict[str, Any]:
    """Maps (C, O, M, h, w) as bytes, with minimum and maximum per map, which are equal for a constant map."""
    flat = maps.flatten(3).double()
    if not flat.numel():
        return {"bytes": "", "least": [], "greatest": []}
    least, greatest = flat.amin(-1), flat.amax(-1)
    # The bound of Explanation.scaled: a map whose values differ only by rounding is constant.
    constant = greatest - least <= 4 * torch.finfo(maps.dtype).eps * flat.abs().amax(-1)
    least = torch.where(constant, greatest, least)
    span = (greatest - least).masked_fill(constant, 1)
    shades = ((flat - least[..., None]) / span[..., None] * 255).round().clamp(0, 255).to(torch.uint8)
    return {
        "bytes": _base64(shades.numpy().tobytes()),
        "least": rounded(least.flatten().tolist()),
        "greatest": rounded(greatest.flatten().tolist()),
    }


def _base64(contents: bytes) -> str:
    return base64.b64encode(contents).decode()


def short(value: float) -> float | None:
    """Five digits, which are more than a page shows; None for NaN."""
    return None if math.isnan(value) else float(f"{value:.5g}")


def rounded(values: Any) -> Any:
    return short(values) if isinstance(values, float | int) else [rounded(value) for value in values]
