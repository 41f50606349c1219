"""The options about relevance maps, and the explanations that they ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from headoff.choices import AblationKind, Pick
from headoff.cli.reports import ImageReport
from headoff.detector import Detector
from headoff.encoded import EncodedImage
from headoff.errors import SettingError
from headoff.figures.colouring import MapStyle
from headoff.relevance import Explanation, explain, make_target, method_names, resolve_method
from headoff.sweeps import SweepResult, query_of_object

ALL = ("all",)
"""In the place of methods: all of them."""


@dataclass(frozen=True)
class RelevanceOptions:
    """Arguments of `headoff.explain`, and how maps are drawn.

    Attributes:
        methods: see `headoff.explain`; the first is that of the report, others can be chosen on its page. `ALL` alone
            stands for all that the detector has.
        target, layers, pick, heads: see `headoff.explain`.
        queries, objects: explain only these; all detected objects if both are empty.
        style: how maps are drawn.
        maps: format of the file of raw maps.
        ablation, references: see `headoff.explain`.

    Raises:
        SettingError: an option is invalid for every detector.
    """

    methods: tuple[str, ...] = ("chefer",)
    target: str = "class"
    layers: str | tuple[int, ...] = "all"
    pick: Pick = "baseline"
    queries: tuple[int, ...] = ()
    objects: tuple[int, ...] = ()
    heads: bool = False
    style: MapStyle = MapStyle()
    maps: Literal["npz", "safetensors"] = "npz"
    ablation: AblationKind = "zero"
    references: Path | None = None

    def __post_init__(self) -> None:
        for method in () if self.methods == ALL else self.methods:
            resolve_method(method)
        make_target(self.target, 0, 0)

    def of(self, detector: Detector) -> RelevanceOptions:
        """These options for a detector. Raises SettingError for queries and layers that it does not have."""
        layout = detector.head_layout
        layers = () if isinstance(self.layers, str) else self.layers
        for noun, numbers, count in (
            ("query", self.queries, layout.queries),
            ("decoder layer", layers, layout.decoder_layers),
        ):
            for number in numbers:
                if number >= count:
                    raise SettingError(
                        f"there is no {noun} {number}: this detector's go from 0 to {count - 1}, use one of those"
                    )
        return replace(self, methods=method_names(detector)) if self.methods == ALL else self

    def describe(self) -> dict[str, str]:
        """These options as part of a report's provenance."""
        relevance = [*self.methods, f"of {self.target}", f"after {_describe_layers(self.layers)}"]
        relevance += [f"pick {self.pick}"]
        relevance += [f"query {query}" for query in self.queries]
        relevance += [f"object {number}" for number in self.objects]
        relevance += ["heads"] if self.heads else []
        style = self.style
        maps = [
            "on the image" if style.overlay else "plain",
            f"scale per {style.scale}",
            style.cmap or "default",
        ]
        maps += ["smooth"] if style.smooth else []
        return {"relevance": ", ".join(relevance), "maps": f"{', '.join(maps)}, {self.maps}"}

    def explain(self, detector: Detector, result: SweepResult, report: ImageReport) -> list[Explanation]:
        """Explain the objects of a sweep under its configurations, by each method."""
        for number in self.objects:
            query_of_object(result.baseline, number)
        objects = result.baseline.subset(self.objects) if self.objects else result.baseline
        encoded = EncodedImage.of(detector, report.picture)
        found: list[Explanation] = []
        # A name may stand for another, as `best` does.
        for method in dict.fromkeys(resolve_method(name).name for name in self.methods):
            words = "explaining" if len(self.methods) == 1 else f"explaining by {method}"
            with report.progress_bar(words, "step") as update:
                found.append(
                    explain(
                        detector,
                        encoded,
                        result.configurations,
                        found[0].objects if found else self.queries or objects,
                        method,
                        self.layers,  # type: ignore[arg-type]
                        target=self.target,
                        pick=self.pick,
                        confidence=result.confidence,
                        heads=self.heads and not found,
                        ablation=self.ablation,
                        references=self.references,
                        progress=update,
                    )
                )
        return found


def parse_methods(text: str) -> tuple[str, ...]:
    """Read names of methods such as `chefer,raw`, or `all`.

    Raises:
        SettingError: a method is named twice.
    """
    names = tuple(part.strip() for part in text.split(","))
    if len(set(names)) < len(names):
        raise SettingError(f"--method {text!r} names a method twice: name each method once")
    return names


def parse_layers(text: str) -> str | tuple[int, ...]:
    """Read `all`, `last`, or numbers of decoder layers such as `0,5`.

    Raises:
        SettingError: the text is none of these.
    """
    if text in ("all", "last"):
        return text
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise SettingError(f"--layers {text!r} names no layers: give all, last, or numbers such as 0,5")
    numbers = tuple(int(part) for part in parts)
    if len(set(numbers)) < len(numbers):
        raise SettingError(f"--layers {text!r} names a layer twice: name each layer once")
    return numbers


def _describe_layers(layers: str | tuple[int, ...]) -> str:
    if isinstance(layers, str):
        return {"all": "all layers", "last": "the last layer"}[layers]
    return f"layers {','.join(map(str, layers))}"
