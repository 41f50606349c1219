"""What `headoff.heads` finds: scores of every head, for every object, with labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from headoff.choices import AblationKind, Site
from headoff.dataframes import dataframe, dataset
from headoff.detections import Detections
from headoff.errors import SettingError, did_you_mean
from headoff.files import write_file
from headoff.gates import order_by_score
from headoff.importance.curves import RemovalCurves, removal_curves
from headoff.importance.measures import Scores
from headoff.wording import counted

if TYPE_CHECKING:
    import pandas
    import xarray
    from matplotlib.axes import Axes

FORMAT = "headoff heads 1"
IMAGE = "image"
"""The object of a value that is one number for the image."""


@dataclass(frozen=True)
class Key:
    """What a table of scores is about."""

    ablation: AblationKind
    measure: str
    value: str

    def __str__(self) -> str:
        return f"{self.ablation}/{self.measure}/{self.value}"


@dataclass(frozen=True)
class Totals:
    """The value of each object (O,) with all heads of the site on, and with all of them off."""

    on: Tensor
    off: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class HeadImportance:
    """What every head of a site contributes to every object of an image. Tensors are float64 on the CPU.

    Attributes:
        objects: the O objects: the detections with nothing off.
        site: where the heads are.
        shape: (L, H), layers and heads.
        scores: for each ablation kind, measure and value; see `headoff.importance.measures.Scores`. A value of the
            image has one row instead of O.
        totals: for each ablation kind and value.
        image_values: the values that are one number for the image.
    """

    objects: Detections
    site: Site
    shape: tuple[int, int]
    scores: Mapping[Key, Scores]
    totals: Mapping[tuple[AblationKind, str], Totals]
    image_values: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        layers, heads = self.shape
        return (
            f"<HeadImportance: {counted(layers * heads, 'head')} of {self.site}, "
            f"{counted(len(self.objects), 'object')}, measures {', '.join(self.measures)}>"
        )

    @property
    def ablations(self) -> tuple[AblationKind, ...]:
        return tuple(dict.fromkeys(key.ablation for key in self.scores))

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key.measure for key in self.scores))

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key.value for key in self.scores))

    @property
    def object_names(self) -> tuple[str, ...]:
        """`#0 dog`, `#1 cat`, ..."""
        return tuple(f"#{number} {found.class_name}" for number, found in enumerate(self.objects))

    def get(
        self, measure: str | None = None, value: str | None = None, ablation: AblationKind | None = None
    ) -> Scores:
        """The scores by a measure of a value under an ablation kind: by default the first of each.

        Raises:
            SettingError: there are none.
        """
        key = Key(ablation or self.ablations[0], measure or self.measures[0], value or self.values[0])
        if key not in self.scores:
            known = ", ".join(str(one) for one in self.scores)
            raise SettingError(
                f"there are no scores {str(key)!r}{did_you_mean(key, map(str, self.scores))}: there are {known}"
            )
        return self.scores[key]

    def mean_scores(
        self, measure: str | None = None, value: str | None = None, ablation: AblationKind | None = None
    ) -> Tensor:
        """The mean over objects, (L, H) or (1, H); zero where there is no object."""
        scores = self.get(measure, value, ablation).scores
        return scores.mean(0) if len(scores) else scores.new_zeros(scores.shape[1:])

    def order(
        self, *, most_important_first: bool = False, **which: Any
    ) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
        """The heads of each layer (or the columns) sorted by `mean_scores(**which)`, for `headoff.cumulative`."""
        scores = self.mean_scores(**which)
        found = order_by_score(scores.tolist(), descending=most_important_first)
        return found if len(scores) > 1 else found[0]  # type: ignore[return-value]

    def curves(
        self,
        value: str | None = None,
        ablation: AblationKind | None = None,
        objects: Sequence[int] | None = None,
    ) -> RemovalCurves:
        """How the value, averaged over objects (all by default), falls as heads go off in all layers.

        Raises:
            SettingError: there are no scores of `shapley_columns`, whose coalitions this takes.
        """
        found = self.get("shapley_columns", value, ablation)
        assert found.coalitions is not None
        chosen = list(range(len(found.scores)) if objects is None else objects)
        heads = self.shape[1]
        values = found.coalitions[chosen].mean(0) if chosen else torch.zeros(2**heads, dtype=torch.float64)
        scores = found.scores[chosen, 0].mean(0) if chosen else torch.zeros(heads)
        least, most = (order_by_score(scores, descending=most) for most in (False, True))
        return removal_curves(values, least, most)  # type: ignore[arg-type]

    def plot_curves(self, ax: Axes | None = None, **which: Any) -> Axes:
        """The value over the number of heads off: `headoff.plot_curves(self.curves(**which), ax)`."""
        from headoff.figures.removal_curves import plot_curves

        return plot_curves(self.curves(**which), ax, value=which.get("value") or self.values[0])

    def rows(self, image: str = "") -> Iterator[dict[str, str | int | float]]:
        """One row for each score: the columns of heads.csv. `layer` is `all` for a head in all layers."""
        for key, found in self.scores.items():
            for o, layers in enumerate(found.scores.tolist()):
                of_image = key.value in self.image_values
                for layer, heads in enumerate(layers):
                    for head, score in enumerate(heads):
                        error = "" if found.errors is None else float(found.errors[o, layer, head])
                        yield {
                            "image": image,
                            "site": self.site,
                            "object": "" if of_image else o,
                            "class": IMAGE if of_image else self.objects[o].class_name,
                            "layer": layer if len(layers) > 1 else "all",
                            "head": head,
                            "ablation": key.ablation,
                            "measure": key.measure,
                            "value": key.value,
                            "score": score,
                            "standard_error": error,
                        }

    def to_dataframe(self) -> pandas.DataFrame:
        """`rows` as a DataFrame. Raises SettingError where pandas is missing."""
        return dataframe(self.rows())

    def to_xarray(self) -> xarray.Dataset:
        """The scores as a Dataset, with a variable for each measure (ablation, value, object, layer, head).

        Measures of heads in all layers have no `layer`. Values of the image are in variables of their own, which end in
        `_image` and have no `object`. Standard errors and interactions are the variables `..._errors` and
        `..._interactions`. What a measure does not score is NaN.

        Raises:
            SettingError: xarray is not installed.

        Example:
            >>> found.to_xarray().removal.sel(ablation="zero", value="iou").mean("object")
        """
        values = {
            "value": [value for value in self.values if value not in self.image_values],
            "image_value": [value for value in self.values if value in self.image_values],
        }
        coordinates: dict[str, list[Any]] = {
            "ablation": list(self.ablations),
            **values,
            "object": list(self.object_names),
            "layer": list(range(self.shape[0])),
            "head": list(range(self.shape[1])),
            "other_head": list(range(self.shape[1])),
        }
        arrays: dict[str, tuple[list[str], Any]] = {}
        for key, found in self.scores.items():
            of_image = key.value in self.image_values
            which = "image_value" if of_image else "value"
            inner = [] if of_image else ["object"]
            inner += ["layer"] if found.scores.shape[1] == self.shape[0] else []
            for part, ending in (("scores", ""), ("errors", "_errors"), ("interactions", "_interactions")):
                tensor = getattr(found, part)
                if tensor is None:
                    continue
                dims = ["ablation", which, *inner, "head"] + ["other_head"] * (part == "interactions")
                sizes = [len(coordinates[dim]) for dim in dims]
                name = key.measure + "_image" * of_image + ending
                if name not in arrays:
                    arrays[name] = (dims, np.full(sizes, np.nan))
                place = self.ablations.index(key.ablation), values[which].index(key.value)
                arrays[name][1][place] = tensor.numpy().reshape(sizes[2:])
        return dataset(arrays, coordinates, {"site": self.site})

    def plot(self, ax: Axes | None = None, **which: Any) -> Axes:
        """A matrix of layers x heads: `headoff.plot_importance(self, ax=ax, **which)`.

        Example:
            >>> found.plot(measure="removal", value="iou", object=0)
        """
        from headoff.figures.importance import plot_importance

        return plot_importance(self, ax=ax, **which)

    def plot_columns(self, ax: Axes | None = None, **which: Any) -> Axes:
        """Bars of heads in all layers: `headoff.plot_columns(self, ax=ax, **which)`."""
        from headoff.figures.importance import plot_columns

        return plot_columns(self, ax, **which)

    def plot_interactions(self, ax: Axes | None = None, **which: Any) -> Axes:
        """Which heads are redundant, and which need each other: `headoff.plot_interactions(self, ax=ax, **which)`."""
        from headoff.figures.importance import plot_interactions

        return plot_interactions(self, ax=ax, **which)

    def plot_ablations(self, ax: Axes | None = None, **which: Any) -> Axes:
        """One ablation kind against another: `headoff.plot_ablations(self, ax=ax, **which)`."""
        from headoff.figures.importance_comparisons import plot_ablations

        return plot_ablations(self, ax, **which)

    # Notebooks ask a result for its pictures, which are drawn by what else depends on this module.
    def _repr_html_(self) -> str:
        from headoff.figures.notebook import importance_html

        return importance_html(self)

    def _repr_png_(self) -> bytes:
        from headoff.figures.notebook import importance_png

        return importance_png(self)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the values of coalitions, as JSON types."""

        def plain(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.tolist()

        return {
            "site": self.site,
            "layers": self.shape[0],
            "heads": self.shape[1],
            "image_values": sorted(self.image_values),
            "objects": self.objects.as_dict(),
            "totals": [
                {"ablation": ablation, "value": value, "on": plain(totals.on), "off": plain(totals.off)}
                for (ablation, value), totals in self.totals.items()
            ],
            "scores": [
                {
                    "ablation": key.ablation,
                    "measure": key.measure,
                    "value": key.value,
                    **{name: plain(getattr(found, name)) for name in _PARTS if name != "coalitions"},
                }
                for key, found in self.scores.items()
            ],
        }

    def save(self, path: str | Path) -> Path:
        """Write all tensors and their labels to a .safetensors file, atomically.

        Raises:
            SettingError: `path` has another suffix.
            OutputError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise SettingError(f"{path} has no known format: end its name in .safetensors")
        tensors = {
            f"{key}/{name}": tensor.contiguous()
            for key, found in self.scores.items()
            for name in _PARTS
            if (tensor := getattr(found, name)) is not None
        }
        for (ablation, value), totals in self.totals.items():
            tensors[f"{ablation}/{value}/on"], tensors[f"{ablation}/{value}/off"] = totals.on, totals.off
        tensors |= {
            f"objects.{name}": getattr(self.objects, name)
            for name in ("queries", "labels", "scores", "boxes")
        }
        metadata = {
            "format": FORMAT,
            "site": self.site,
            "shape": list(self.shape),
            "image_size": list(self.objects.image_size),
            "class_names": list(self.objects.class_names),
            "scores": [str(key) for key in self.scores],
            "totals": ["/".join(key) for key in self.totals],
        }
        write_file(path, safetensors.torch.save(tensors, {"headoff": json.dumps(metadata)}))
        return path


_PARTS = ("scores", "errors", "interactions", "coalitions", "residuals")
