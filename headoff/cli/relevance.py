"""Which relevance maps are wanted, and the report that has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm import tqdm

from headoff.detr import Detector
from headoff.errors import SettingError
from headoff.figures.colouring import MapStyle, Scale
from headoff.gates import HeadLayout
from headoff.relevance import Explanation, explain, make_target, resolve_method
from headoff.relevance.explanations import Pick
from headoff.report import write_report
from headoff.sweeps import SweepResult, query_of_object

Maps = Literal["npz", "safetensors"]


@dataclass(frozen=True)
class Wanted:
    """What `explain` is asked for, and how it is drawn. Raises SettingError for what no detector could give.

    `queries` and `objects`: these alone; all objects where neither is given. `scale`: None stands for one scale for
    all configurations, and for each map its own where there is one configuration, as the paper's notebook draws it.
    """

    method: str = "chefer"
    target: str = "class"
    layers: str | tuple[int, ...] = "all"
    pick: Pick = "baseline"
    queries: tuple[int, ...] = ()
    objects: tuple[int, ...] = ()
    heads: bool = False
    scale: Scale | None = None
    overlay: bool = False
    cmap: str | None = None
    maps: Maps = "npz"

    def __post_init__(self) -> None:
        resolve_method(self.method)
        make_target(self.target, 0, 0)
        MapStyle(self.scale or "sweep", self.overlay, self.cmap)

    def check(self, layout: HeadLayout) -> None:
        """Refuse, before any image is read, queries and layers that this detector does not have."""
        layers = () if isinstance(self.layers, str) else self.layers
        for what, asked, count in (
            ("query", self.queries, layout.queries),
            ("decoder layer", layers, layout.decoder_layers),
        ):
            for each in asked:
                if each >= count:
                    raise SettingError(
                        f"there is no {what} {each}: this detector's go from 0 to {count - 1}, use one of those"
                    )

    def words(self) -> dict[str, str]:
        """For the report, and for knowing it again."""
        said = [self.method, f"of {self.target}", f"after {_words(self.layers)}", f"pick {self.pick}"]
        said += [f"query {each}" for each in self.queries] + [f"object {each}" for each in self.objects]
        said += ["heads"] if self.heads else []
        drawn = ["overlay" if self.overlay else "plain", self.scale or "default", self.cmap or "default"]
        return {"relevance": ", ".join(said), "maps": f"{', '.join(drawn)}, {self.maps}"}

    def style(self, configurations: int) -> MapStyle:
        return MapStyle(self.scale or ("sweep" if configurations > 1 else "map"), self.overlay, self.cmap)

    def write(
        self,
        folder: Path,
        picture: Image.Image,
        detector: Detector,
        result: SweepResult,
        made_with: Mapping[str, str],
        progress: bool = True,
    ) -> Explanation:
        """Explain the objects of a sweep's result under its configurations, and write the report of both."""
        queries = self.queries or result.baseline.queries.tolist()
        if self.objects:
            queries = [query_of_object(result.baseline, each) for each in self.objects]
        with tqdm(
            total=len(result), desc="explaining", unit="configuration", disable=not progress, leave=False
        ) as bar:
            explanation = explain(
                detector,
                picture,
                result.configurations,
                queries,
                self.method,
                self.layers,  # type: ignore[arg-type]
                target=self.target,
                pick=self.pick,
                confidence=result.confidence,
                heads=self.heads,
                progress=lambda *_: bar.update(),
            )
        write_report(
            folder,
            picture,
            result,
            provenance=made_with,
            explanation=explanation,
            style=self.style(len(result)),
            maps=self.maps,
        )
        return explanation


def layers_of(text: str) -> str | tuple[int, ...]:
    """`all`, `last`, or decoder layers: `0,5`."""
    if text in ("all", "last"):
        return text
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise SettingError(f"--layers {text!r} names no layers: give all, last, or numbers such as 0,5")
    numbers = tuple(int(part) for part in parts)
    if len(set(numbers)) < len(numbers):
        raise SettingError(f"--layers {text!r} names a layer twice: name each once")
    return numbers


def _words(layers: str | tuple[int, ...]) -> str:
    if isinstance(layers, str):
        return {"all": "all layers", "last": "the last layer"}[layers]
    return f"layers {','.join(map(str, layers))}"
