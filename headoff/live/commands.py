"""What the page shows, as a command line and as Python."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Origin:
    """How to get the detector again.

    Attributes:
        model: see `headoff.load`.
        load: its other arguments that are not the default.
        options: all of them as options of the command line.
    """

    model: str = "scenes"
    load: Mapping[str, Any] = field(default_factory=dict)
    options: Sequence[str] = ()


@dataclass(frozen=True)
class Recipe:
    """What a sweep needs to find the same.

    Attributes:
        origin: of the detector.
        image: path of the image; None for the first bundled scene.
        text: the configuration.
        ablation, references, confidence: see `headoff.sweep`.
    """

    origin: Origin
    image: str | None
    text: str
    ablation: str = "zero"
    references: Path | None = None
    confidence: float = 0.5

    def command(self) -> str:
        """The line of `headoff sweep`."""
        words = ["headoff", "sweep"]
        words += [] if self.image is None else [self.image]
        words += [*self.origin.options, "--off", self.text]
        words += [] if self.ablation == "zero" else ["--ablate", self.ablation]
        words += [] if self.references is None else ["--references", str(self.references)]
        words += [] if self.confidence == 0.5 else ["--confidence", repr(self.confidence)]
        return shlex.join(words)

    def program(self) -> str:
        """The Python that leaves what became of the objects in `outcome`."""
        load = "".join(f", {name}={value!r}" for name, value in self.origin.load.items())
        image = "headoff.sample_image(0)" if self.image is None else repr(self.image)
        options = "" if self.ablation == "zero" else f", ablation={self.ablation!r}"
        options += "" if self.references is None else f", references={str(self.references)!r}"
        options += "" if self.confidence == 0.5 else f", confidence={self.confidence!r}"
        return (
            "import headoff\n\n"
            f"detector = headoff.load({self.origin.model!r}{load})\n"
            f"result = headoff.sweep(detector, {image}, {self.text!r}{options})\n"
            "outcome = result.outcomes[0]\n"
        )
