"""Checkpoints: loading, downloading and saving detectors.

- `load`: the one function that reads every kind of checkpoint
- `files`: a file to named tensors, without executing anything in it
- `layouts`: tensor names of the original code and of Hugging Face to headoff's names
- `fitting`: named tensors to a detector; sizes come from shapes, and every tensor is checked
- `native`: headoff's checkpoint layout
- `choice`: a model and what its file may not say, as one value
- `published`, `huggingface`, `download`: where published weights come from
"""

from headoff.detr.checkpoints.choice import ModelChoice, class_names_in
from headoff.detr.checkpoints.coco import COCO_CLASSES
from headoff.detr.checkpoints.load import load
from headoff.detr.checkpoints.native import save_native
from headoff.detr.checkpoints.published import ORIGINALS, cache_folder

__all__ = [
    "COCO_CLASSES",
    "ORIGINALS",
    "ModelChoice",
    "cache_folder",
    "class_names_in",
    "load",
    "save_native",
]
