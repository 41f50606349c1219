"""Layer-wise relevance propagation (LRP) through headoff's own DETR, and the relevance methods that use it."""

from headoff.relevance.lrp.engine import LrpEngine, LrpMethod, TokenRelevanceEngine
from headoff.relevance.lrp.rules import EpsilonRules, LrpRules, PositiveRules

__all__ = ["EpsilonRules", "LrpEngine", "LrpMethod", "LrpRules", "PositiveRules", "TokenRelevanceEngine"]
