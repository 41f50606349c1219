"""D-FINE (Peng et al., ICLR 2025, arXiv 2410.13842): RT-DETR's encoder and decoder with boxes as distributions, levels
that may differ in their sampling points, and cross-attention without projections of values and output.
"""

from headoff.family.adapter import register_adapter
from headoff.family.types.rt_detr import adapter

register_adapter(adapter("d_fine", "DFineForObjectDetection"))
