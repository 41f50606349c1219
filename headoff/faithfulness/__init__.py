"""Whether relevance maps say what the detector looks at: measures, controls, and tables of methods with intervals.

`faithfulness` is the entry point. A `Measure` computes quantities for the objects of an `ExplainedImage`.
"""

import sys
from types import ModuleType
from typing import Any

from headoff.faithfulness import perturbation as perturbation  # registers its measures
from headoff.faithfulness.controls import CONTROLS, known_methods
from headoff.faithfulness.explained import ExplainedImage
from headoff.faithfulness.measures import (
    Measure,
    Quantity,
    Scores,
    measure_names,
    register_measure,
    resolve_measure,
)
from headoff.faithfulness.perturbation import Perturbation
from headoff.faithfulness.result import Faithfulness
from headoff.faithfulness.runner import faithfulness
from headoff.faithfulness.statistics import Comparison, Estimate
from headoff.faithfulness.truth import Truth

__all__ = [
    "CONTROLS",
    "Comparison",
    "Estimate",
    "ExplainedImage",
    "Faithfulness",
    "Measure",
    "Perturbation",
    "Quantity",
    "Scores",
    "Truth",
    "faithfulness",
    "known_methods",
    "measure_names",
    "register_measure",
    "resolve_measure",
]


class _Module(ModuleType):
    """`headoff.faithfulness` is this package, once something has imported it, and must be the function, too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Faithfulness:
        return faithfulness(*args, **kwargs)


sys.modules[__name__].__class__ = _Module
