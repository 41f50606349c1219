"""DETR: backbone, transformer, detector and checkpoints."""

from headoff.detr.config import BackboneConfig, DetrConfig
from headoff.detr.detector import Detr, Memory

__all__ = ["BackboneConfig", "Detr", "DetrConfig", "Memory"]
