"""The DETR family: detectors of the package transformers as headoff's `Detector`.

transformers computes them. headoff stands in their attention: every call of an encoder or decoder attention goes
through `Detector.context_of`, where heads are gated, replaced, recorded or computed by another callable.

- `adapter`: what differs between types of models, and the registry; `types/` has one file for each type.
- `attention`: how calls are intercepted in transformers' modules.
- `detector`: `FamilyDetector`.
- `levels`: several levels of memory tokens on one grid.
- `loading`: from a folder in Hugging Face's layout.
"""

from headoff.family.adapter import Adapter, adapter_names, register_adapter
from headoff.family.detector import FamilyDetector

__all__ = ["Adapter", "FamilyDetector", "adapter_names", "register_adapter"]
