"""The engine that computes a detector's relevance."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from headoff.detector import Detector
from headoff.detr.detector import Detr
from headoff.relevance.autograd_engine import AutogradEngine
from headoff.relevance.engine import RelevanceEngine


@singledispatch
def make_engine(detector: Detector, features: Any, **options: Any) -> RelevanceEngine | AutogradEngine:
    """The engine for the features of one image; see `RelevanceEngine` for the options.

    Raises:
        SettingError: an option is unknown, or cannot be combined with the others.
    """
    return AutogradEngine(detector, features, **options)


make_engine.register(Detr, RelevanceEngine)
