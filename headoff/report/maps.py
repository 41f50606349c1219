"""An explanation as compact data for the page, whose script colours it: scale and colours are a choice there.

Each map is a byte per token between its own least and greatest, which are given beside it. So a map that is faint in
the whole sweep keeps all its shades for the moment in which it is drawn on its own scale.
"""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headoff.figures.colouring import OPACITY, MapStyle
from headoff.figures.object_views import object_views
from headoff.figures.relevance import grid_span
from headoff.relevance.explanations import Explanation
from headoff.sweeps import SweepResult

MOST_BYTES = 8 * 2**20
"""Of maps on a page. Beyond, the heads' attention is left out, then the last configurations; files have it all."""


def page_maps(
    explanation: Explanation, result: SweepResult, style: MapStyle, frames: Sequence[int | None]
) -> dict[str, Any]:
    """What the page's script needs.

    Args:
        style: with which the maps are drawn at first.
        frames: by picture of the page, the configuration's index in `explanation`.
    """
    channels = [("relevance", explanation.maps)]
    size = max(explanation.maps.numel(), 1)
    if explanation.heads is not None and explanation.heads.numel() + size <= MOST_BYTES:
        channels += [(f"head {head}", each) for head, each in enumerate(explanation.heads.unbind(3))]
    # Of the first configurations, as many as fit; at least one.
    count = min(len(explanation), max(1, MOST_BYTES * len(explanation) // size))
    views = [
        object_views(explanation, index, baseline=result.baseline, confidence=result.confidence)
        for index in range(count)
    ]
    rows, columns = explanation.grid
    masses, shares = explanation.masses, explanation.box_shares
    return {
        "rows": rows,
        "columns": columns,
        "span": grid_span(explanation),
        "layers": explanation.layers,
        "objects": [
            {"colour": view.colour, "first": _rounded(view.first_box), "score": _short(view.first_score)}
            for view in (views[0] if views else ())
        ],
        "configurations": [
            {
                "objects": [
                    {
                        "name": view.name,
                        "query": view.query,
                        "score": None if view.score is None else _short(view.score),
                        "box": None if view.box is None else _rounded(view.box),
                    }
                    for view in views[index]
                ],
                "masses": _rounded(masses[index].tolist()),
                "shares": _rounded(shares[index].tolist()),
            }
            for index in range(count)
        ],
        "frames": [None if index is None or index >= count else index for index in frames],
        "channels": [{"name": name, **_packed(maps[:count])} for name, maps in channels],
        "colours": {
            name: _base64(replace(style, overlay=overlay).colours.tobytes())
            for name, overlay in (("plain", False), ("overlay", True))
        },
        "opacity": OPACITY,
        "scale": style.scale,
        "overlay": style.overlay,
    }


def as_script(data: dict[str, Any]) -> str:
    """JSON that stays within a <script> element, whatever names it has."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _packed(maps: Tensor) -> dict[str, Any]:
    """(C, O, M, h, w) as bytes, with each map's least and greatest; a constant map has them equal."""
    flat = maps.flatten(3).double()
    if not flat.numel():
        return {"bytes": "", "least": [], "greatest": []}
    least, greatest = flat.amin(-1), flat.amax(-1)
    # The same bound as Explanation.scaled: what differs by rounding is constant.
    constant = greatest - least <= 4 * torch.finfo(maps.dtype).eps * greatest
    least = torch.where(constant, greatest, least)
    span = (greatest - least).masked_fill(constant, 1)
    shades = ((flat - least[..., None]) / span[..., None] * 255).round().clamp(0, 255).to(torch.uint8)
    return {
        "bytes": _base64(shades.numpy().tobytes()),
        "least": _rounded(least.flatten().tolist()),
        "greatest": _rounded(greatest.flatten().tolist()),
    }


def _base64(contents: bytes) -> str:
    return base64.b64encode(contents).decode()


def _short(value: float) -> float | None:
    """Five digits are more than a page shows."""
    return None if math.isnan(value) else float(f"{value:.5g}")


def _rounded(values: Any) -> Any:
    return _short(values) if isinstance(values, float | int) else [_rounded(each) for each in values]
