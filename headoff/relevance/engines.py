"""The engine that computes a detector's relevance."""

from __future__ import annotations

from typing import Any

from PIL import Image

from headoff.detector import Detector
from headoff.detr.detector import Detr
from headoff.errors import SettingError
from headoff.relevance.autograd_engine import AutogradEngine
from headoff.relevance.engine import RelevanceEngine
from headoff.relevance.methods import EngineMethod, Method, resolve_method

_OF_CAMS = {"zero_rows": "identity", "backward": "auto", "kernels": "auto"}
"""Options of the engines of `CamMethod`, and what other engines take for them."""


def make_engine(
    detector: Detector,
    features: Any,
    *,
    method: Method | str = "chefer",
    picture: Image.Image | None = None,
    memory_budget: int | None = None,
    **options: Any,
) -> Any:
    """The engine of `method` for the features of one image.

    Args:
        picture: the image, which methods that change pixels need.
        memory_budget, options: see `RelevanceEngine`.

    Raises:
        SettingError: an option is unknown, or cannot be combined with the others.
    """
    method = resolve_method(method)
    if isinstance(method, EngineMethod):
        taken = {name: options.pop(name) for name in method.takes if name in options}
        for name, value in options.items():
            if value != _OF_CAMS.get(name):
                raise SettingError(
                    f"{name} cannot be {value!r} for {method.name}, which has no such choice: leave it out"
                )
        return method.engine(
            detector, features, method=method, picture=picture, memory_budget=memory_budget, **taken
        )
    options.update(method=method, memory_budget=memory_budget)
    if isinstance(detector, Detr):
        return RelevanceEngine(detector, features, **options)
    return AutogradEngine(detector, features, **options)
