"""Checkpoints: loading, downloading and saving detectors.

- `load`: the one function that reads every kind of checkpoint
- `files`: a file to named tensors, without executing anything in it
- `layouts`: tensor names of the original code and of Hugging Face to headoff's names
- `fitting`: named tensors to a detector; sizes come from shapes, and every tensor is checked
- `native`: headoff's checkpoint layout
- `published`, `huggingface`, `download`: where published weights come from
"""

from headoff.detr.checkpoints.coco import COCO_CLASSES
from headoff.detr.checkpoints.load import load
from headoff.detr.checkpoints.native import save_native
from headoff.detr.checkpoints.published import ORIGINALS, cache_folder

__all__ = ["COCO_CLASSES", "ORIGINALS", "cache_folder", "load", "save_native"]
