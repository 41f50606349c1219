"""DETR: backbone, transformer, detector and checkpoints."""

from headoff.detr.config import BackboneConfig, DetrConfig
from headoff.detr.detector import Detector, DetectorOutput, Memory

__all__ = ["BackboneConfig", "DetectorOutput", "Detector", "DetrConfig", "Memory"]
