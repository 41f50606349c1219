"""A model, and what its file may not say, as one value: to load the same detector in several ways."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headoff.detector import Detector
from headoff.detr.checkpoints.load import is_of_family, load
from headoff.detr.detector import Detr
from headoff.errors import CheckpointError, SettingError, error_line


@dataclass(frozen=True)
class ModelChoice:
    """What decides a detector's weights and results, whatever it computes on; see `headoff.load`.

    Attributes:
        source, heads, dilated, class_names, short_side: the arguments of `headoff.load`.
    """

    source: str
    heads: int | None = None
    dilated: bool | None = None
    class_names: tuple[str, ...] | None = None
    short_side: int | None = None

    def load(self, **placement: Any) -> Detector:
        """The detector.

        Args:
            placement: `attention`, `device` and `dtype` of `headoff.load`.

        Raises:
            HeadoffError: what `headoff.load` raises.
        """
        return load(
            self.source,
            heads=self.heads,
            dilated=self.dilated,
            class_names=self.class_names,
            short_side=self.short_side,
            **placement,
        )

    def is_of_family(self) -> bool:
        """Whether the model is one of transformers (`headoff.family`), and not headoff's own DETR.

        Raises:
            HeadoffError: there is no such model, or its configuration cannot be read.
        """
        return is_of_family(self.source)

    def load_detr(self, **placement: Any) -> Detr:
        """The detector, which must be headoff's own DETR; see `load`.

        Raises:
            CheckpointError: it is another detector.
        """
        detector = self.load(**placement)
        if not isinstance(detector, Detr):
            raise CheckpointError(
                f"{self.source} is not a DETR, whose attention the suites and benchmarks check: give one, such as "
                "scenes or detr-resnet-50"
            )
        return detector


def class_names_in(path: Path | None) -> tuple[str, ...] | None:
    """The lines of a text file, without empty ones; None for None. Raises SettingError where it cannot be read."""
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise SettingError(
            f"--classes: {path} cannot be read ({error_line(error)}); give a text file"
        ) from error
    return tuple(line.strip() for line in lines if line.strip())
