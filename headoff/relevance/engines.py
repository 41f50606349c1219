"""The engine that computes a detector's relevance."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from headoff.detector import Detector
from headoff.detr.detector import Detr
from headoff.relevance.engine import RelevanceEngine


@singledispatch
def make_engine(detector: Detector, features: Any, **options: Any) -> RelevanceEngine:
    """The engine for the features of one image; see `RelevanceEngine` for the options.

    Raises:
        SettingError: an option is unknown, or cannot be combined with the others.
    """
    raise NotImplementedError(type(detector).__name__)


make_engine.register(Detr, RelevanceEngine)
