"""Whether relevance maps say what the detector looks at: measures, controls, and tables of methods with intervals.

`faithfulness` is the entry point. A `Measure` computes quantities for the objects of an `ExplainedImage`.
"""

import sys
from types import ModuleType
from typing import Any

# These register their measures, in this order.
# isort: off
from headoff.faithfulness import perturbation as perturbation
from headoff.faithfulness import localisation as localisation
from headoff.faithfulness import segmentation as segmentation
from headoff.faithfulness import sanity as sanity
from headoff.faithfulness import causal as causal

# isort: on
from headoff.faithfulness.causal import CausalAgreement
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
from headoff.faithfulness.sanity import Randomisation, TargetSensitivity
from headoff.faithfulness.segmentation import Segmentation
from headoff.faithfulness.statistics import Comparison, Estimate
from headoff.faithfulness.truth import Truth

__all__ = [
    "CONTROLS",
    "CausalAgreement",
    "Comparison",
    "Estimate",
    "ExplainedImage",
    "Faithfulness",
    "Measure",
    "Perturbation",
    "Quantity",
    "Randomisation",
    "Scores",
    "Segmentation",
    "TargetSensitivity",
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
