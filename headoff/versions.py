"""Versions of what made a result."""

from __future__ import annotations

import platform

import torch

from headoff import __version__


def versions() -> dict[str, str]:
    """Versions of headoff, torch and Python, for the provenance of results."""
    return {"headoff": __version__, "torch": torch.__version__, "python": platform.python_version()}
