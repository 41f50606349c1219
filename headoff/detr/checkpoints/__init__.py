"""Checkpoints: reading published and own ones, downloading, saving.

files         bytes to tensors, never running what is in them; atomic writing
layouts       names of the original and the Hugging Face layout to headoff's
fitting       tensors to a detector: sizes from shapes, every check
native        headoff's own layout
download, published, huggingface    where published weights come from
load          all of it behind one function
"""

from headoff.detr.checkpoints.coco import COCO_CLASSES
from headoff.detr.checkpoints.load import load
from headoff.detr.checkpoints.native import save_native
from headoff.detr.checkpoints.published import ORIGINALS, cache_folder

__all__ = ["COCO_CLASSES", "ORIGINALS", "cache_folder", "load", "save_native"]
