"""Relevance maps: where in the image the evidence for a detection comes from, under any head gates.

`explain` is the entry point, and `RelevanceEngine` computes the maps. `rules` and `oracle` are the dense reference.
"""

from headoff.relevance.d_rise import d_rise
from headoff.relevance.engine import (
    ConfigurationRelevance,
    PairRelevance,
    RelevanceEngine,
)
from headoff.relevance.explainer import explain
from headoff.relevance.explanations import Explanation, ExplanationStatus, load_explanation
from headoff.relevance.gradient_engine import integrated_gradients
from headoff.relevance.lrp import LrpMethod
from headoff.relevance.memory import MEMORY_BUDGET
from headoff.relevance.methods import (
    CamMethod,
    EngineMethod,
    Method,
    cam_method_names,
    method_names,
    register_method,
    resolve_cam_method,
    resolve_method,
)
from headoff.relevance.targets import BOX_COORDINATES, Target, box_coordinate, class_logit, make_target

__all__ = [
    "BOX_COORDINATES",
    "CamMethod",
    "EngineMethod",
    "MEMORY_BUDGET",
    "ConfigurationRelevance",
    "Explanation",
    "ExplanationStatus",
    "LrpMethod",
    "Method",
    "PairRelevance",
    "RelevanceEngine",
    "Target",
    "box_coordinate",
    "cam_method_names",
    "class_logit",
    "d_rise",
    "explain",
    "integrated_gradients",
    "load_explanation",
    "make_target",
    "method_names",
    "register_method",
    "resolve_cam_method",
    "resolve_method",
]
