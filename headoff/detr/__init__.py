"""DETR: backbone, positions, transformer, detector, and the checkpoints it is read from."""

from headoff.detr.config import BackboneConfig, DetrConfig
from headoff.detr.detector import Detector, DetectorOutput, Memory

__all__ = ["BackboneConfig", "DetectorOutput", "Detector", "DetrConfig", "Memory"]
