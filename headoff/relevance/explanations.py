"""Explanations: relevance maps of an image's objects under several configurations, and their file formats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from headoff.choices import Pick
from headoff.dataframes import dataframe
from headoff.detections import Detections, class_probabilities
from headoff.errors import SettingError, error_line
from headoff.files import atomic_write, output_errors
from headoff.gates import Configuration, parse_configuration
from headoff.relevance.rules import ZeroRows
from headoff.relevance.token_grid import TokenGrid
from headoff.scoring import Scoring
from headoff.wording import counted

if TYPE_CHECKING:
    import pandas

FORMAT = "headoff explanation 2"


class ExplanationStatus(StrEnum):
    """Whether a map shows anything."""

    OK = "ok"
    NO_EVIDENCE = "no image evidence"
    """The map is exactly zero: no evidence from the image reaches the target through the heads that are on."""
    NOT_FOUND = "not found"
    """With `pick="object"`: no query detects the object under this configuration, so nothing is explained."""


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """Relevance of C configurations, O objects and M decoder layers over h x w image tokens. Tensors are on the CPU.

    Attributes:
        configurations: C, in the order given.
        objects: the O explained objects: the baseline's detections by falling score, or the given queries in that
            order.
        layers: the M decoder layers, from 0; a map is the relevance *after* a layer.
        maps: (C, O, M, h, w), raw relevance without a unit; float32, or float64 for a float64 detector. Only signed
            methods have negative relevance, which is evidence against the target.
        queries: (C, O) int64, the explained query; -1 if not found.
        labels: (C, O) int64, the explained class; -1 if not found.
        values: (C, O) float64, the target's value under the configuration; NaN if not found.
        decoder_identity_rows: (C, O, M) int64, the number of rows of R_qq - I that sum to zero, which equations 8 and 9
            cannot normalise. 0 for methods without normalisation, and where there is no evidence to normalise.
        encoder_identity_rows: (C, O) int64, the same for R_ii - I, without padding.
        reference_differs: (C, O, M) bool, whether the paper's published code drops a contribution to the map, because
            equation 9 is 0/0; see `headoff.relevance.rules`.
        logits: (C, Q, K + 1), the detector's output.
        boxes: (C, Q, 4), the detector's output.
        heads: (C, O, M, H, h, w), cross-attention weights after the gate, per head; None unless requested.
        points: (C, O, M, H, K, 3), the K sampling points of every head of deformable cross-attention: x and y as
            fractions of the image, and the attention weight after the gate. None for dense attention, or unless
            requested.
        tokens: (C, O, M, N), the relevance of the memory's tokens where it has several levels; None where it has one.
            `maps` is their sum on the finest level's grid.
        shapes: (h, w) of each level.
        through_encoder: whether maps show the tokens that the encoder started from; otherwise relevance ends at the
            memory's tokens, because the encoder is not attention between them.
        stride: pixels of the resized picture per cell of a map, along one side.
        resized: (height, width) of the resized picture.
        method, target, pick, zero_rows: the arguments of `explain`.
    """

    configurations: tuple[Configuration, ...]
    objects: Detections
    layers: tuple[int, ...]
    maps: Tensor
    queries: Tensor
    labels: Tensor
    values: Tensor
    decoder_identity_rows: Tensor
    encoder_identity_rows: Tensor
    reference_differs: Tensor
    logits: Tensor
    boxes: Tensor
    heads: Tensor | None
    points: Tensor | None
    tokens: Tensor | None
    shapes: tuple[tuple[int, int], ...]
    through_encoder: bool
    stride: int
    resized: tuple[int, int]
    method: str
    target: tuple[str, ...]
    pick: Pick
    zero_rows: ZeroRows

    def __len__(self) -> int:
        return len(self.configurations)

    def __repr__(self) -> str:
        configurations, objects, layers = self.maps.shape[:3]
        return (
            f"<Explanation by {self.method}: {counted(configurations, 'configuration')}, "
            f"{counted(objects, 'object')}, {counted(layers, 'layer')}>"
        )

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return self.maps.shape[-2], self.maps.shape[-1]

    @property
    def token_grid(self) -> TokenGrid:
        """Where the cells of the maps are in the image."""
        return TokenGrid(self.grid, self.stride, self.resized, self.image_size)

    @property
    def levels(self) -> tuple[Tensor, ...]:
        """The maps of each level of the memory, (C, O, M, h, w) each, the finest first."""
        if self.tokens is None:
            return (self.maps,)
        parts = self.tokens.split([h * w for h, w in self.shapes], -1)
        return tuple(part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True))

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the original image in pixels."""
        return self.objects.image_size

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The labels along each axis of `maps`."""
        rows, columns = self.grid
        return {
            "configuration": tuple(configuration.name for configuration in self.configurations),
            "object": tuple(
                f"query {detection.query}: {detection.class_name} {detection.score:.2f}"
                for detection in self.objects
            ),
            "layer": self.layers,
            "row": tuple(range(rows)),
            "column": tuple(range(columns)),
        }

    @property
    def masses(self) -> Tensor:
        """(C, O, M) float64: the sum of each map."""
        return self.maps.double().sum((-2, -1))

    @property
    def is_signed(self) -> bool:
        """Whether any relevance is negative."""
        return bool((self.maps < 0).any())

    @property
    def scores(self) -> Tensor:
        """(C, O) float64: probability of the explained class at the explained query; NaN if not found."""
        probabilities = torch.stack(
            [class_probabilities(logits, self.objects.scoring) for logits in self.logits]
        )
        configurations = torch.arange(len(self))[:, None]
        found = self.queries >= 0
        scores = probabilities[configurations, self.queries.clamp(min=0), self.labels.clamp(min=0)]
        return scores.masked_fill(~found, torch.nan)

    @property
    def statuses(self) -> tuple[tuple[tuple[ExplanationStatus, ...], ...], ...]:
        """Per configuration, object and layer."""
        found, some = (self.queries >= 0).tolist(), (self.maps != 0).flatten(3).any(-1).tolist()
        return tuple(
            tuple(
                tuple(
                    (ExplanationStatus.OK if evidence else ExplanationStatus.NO_EVIDENCE)
                    if is_found
                    else ExplanationStatus.NOT_FOUND
                    for evidence in layers
                )
                for is_found, layers in zip(found_row, row, strict=True)
            )
            for found_row, row in zip(found, some, strict=True)
        )

    @property
    def box_shares(self) -> Tensor:
        """(C, O, M) float64: the share of the positive relevance inside the object's box, 0..1; NaN if there is none.

        The box is that of the baseline under every configuration. A token that it covers partly counts partly.
        """
        cover = torch.stack(
            [self.token_grid.cover(box) for box in self.objects.boxes.double()] or [torch.zeros(self.grid)]
        )
        maps = self.maps.double().clamp(min=0)
        inside, all_of_it = (maps * cover[: len(self.objects), None]).sum((-2, -1)), maps.sum((-2, -1))
        return inside / all_of_it.masked_fill(all_of_it == 0, torch.nan)

    @property
    def peaks(self) -> Tensor:
        """(C, O, M, 2) float64: (x, y) in pixels of the original image, the centre of the token with the greatest
        relevance; NaN if the mass is zero."""
        middles_y, middles_x = self.token_grid.middles
        flat = self.maps.flatten(-2)
        index = flat.argmax(-1)
        columns = self.grid[1]
        peaks = torch.stack((middles_x[index % columns], middles_y[index // columns]), dim=-1)
        return peaks.masked_fill((self.masses == 0)[..., None], torch.nan)

    def scaled(self, per: Literal["map", "object", "sweep"] = "sweep") -> Tensor:
        """`maps` scaled to 0..1 for drawing.

        Args:
            per: `sweep`: one scale from 0 to the greatest relevance, so that maps can be compared. `object`: such a
                scale for each object, over configurations and layers. `map`: each map from its smallest to its
                greatest relevance, as in the paper's notebook.

        Negative relevance, and maps that are constant up to rounding, become 0.
        """
        if per not in ("map", "object", "sweep"):
            raise SettingError(f"maps cannot be scaled per {per!r}: use map, object or sweep")
        maps = self.maps.clamp(min=0)
        if not maps.numel():
            return maps
        if per == "map":
            least, greatest = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
        else:
            dims = (0, 2, 3, 4) if per == "object" else (0, 1, 2, 3, 4)
            greatest = maps.amax(dims, keepdim=True)
            least = torch.zeros_like(greatest)
        span = greatest - least
        constant = span <= 4 * torch.finfo(maps.dtype).eps * greatest
        return ((maps - least) / span.masked_fill(constant, 1)).masked_fill(constant, 0)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each map, as in relevance.csv; None where there is no value, as in the peak of no evidence."""
        scores, values = self.scores.tolist(), self.values.tolist()
        masses, shares = self.masses.tolist(), self.box_shares.tolist()
        peaks, statuses = self.peaks.tolist(), self.statuses
        for c, configuration in enumerate(self.configurations):
            for o in range(len(self.objects)):
                query, label = int(self.queries[c, o]), int(self.labels[c, o])
                found = query >= 0
                for m, layer in enumerate(self.layers):
                    yield {
                        "configuration": configuration.name,
                        "text": configuration.text,
                        "method": self.method,
                        "target": self.target[o],
                        "object": o,
                        "query": query if found else None,
                        "label": label if found else None,
                        "class": self.objects.class_names[label] if found else None,
                        "score": _without_nan(scores[c][o]),
                        "value": _without_nan(values[c][o]),
                        "layer": layer,
                        "status": statuses[c][o][m].value,
                        "mass": _without_nan(masses[c][o][m]),
                        "share_in_box": _without_nan(shares[c][o][m]),
                        "peak_x": _without_nan(peaks[c][o][m][0]),
                        "peak_y": _without_nan(peaks[c][o][m][1]),
                        "decoder_identity_rows": int(self.decoder_identity_rows[c, o, m]),
                        "encoder_identity_rows": int(self.encoder_identity_rows[c, o]),
                        "reference_differs": bool(self.reference_differs[c, o, m]),
                    }

    def to_dataframe(self) -> pandas.DataFrame:
        """`rows` as a DataFrame. Raises SettingError where pandas is missing."""
        return dataframe(self.rows())

    # Notebooks ask a result for its pictures, which are drawn by what else depends on this module.
    def _repr_html_(self) -> str:
        from headoff.figures.notebook import explanation_html

        return explanation_html(self)

    def _repr_png_(self) -> bytes:
        from headoff.figures.notebook import explanation_png

        return explanation_png(self)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the maps as JSON types; NaN becomes None."""

        def plain(values: Tensor) -> Any:
            return _without_nan(values.tolist())

        return {
            "method": self.method,
            "target": list(self.target),
            "pick": self.pick,
            "zero_rows": self.zero_rows,
            "layers": list(self.layers),
            "grid": list(self.grid),
            "levels": [list(shape) for shape in self.shapes],
            "through_encoder": self.through_encoder,
            "objects": self.objects.as_dict(),
            "configurations": [
                {"name": configuration.name, "configuration": configuration.text}
                for configuration in self.configurations
            ],
            "queries": plain(self.queries),
            "labels": plain(self.labels),
            "scores": plain(self.scores),
            "values": plain(self.values),
            "statuses": self.statuses,
            "masses": plain(self.masses),
            "box_shares": plain(self.box_shares),
            "peaks": plain(self.peaks),
            "decoder_identity_rows": plain(self.decoder_identity_rows),
            "encoder_identity_rows": plain(self.encoder_identity_rows),
            "reference_differs": self.reference_differs.tolist(),
        }

    def save(self, path: str | Path) -> Path:
        """Write all tensors, and the labels of their axes as JSON, to a .npz or .safetensors file.

        Arrays have the names of the attributes. The JSON is the array `metadata` of a .npz file, and the metadata
        entry `headoff` of a .safetensors file. The file is written atomically.

        Raises:
            SettingError: `path` has another suffix.
            OutputError: the file cannot be written.
        """
        path = Path(path)
        tensors = {
            name: getattr(self, name).contiguous() for name in _TENSORS if getattr(self, name) is not None
        }
        tensors |= {f"objects.{name}": getattr(self.objects, name).contiguous() for name in _OBJECT_TENSORS}
        metadata = json.dumps(
            {
                "format": FORMAT,
                "axes": {
                    "maps": ["configuration", "object", "layer", "row", "column"],
                    **{name: list(labels) for name, labels in self.axes.items()},
                },
                "configurations": [
                    [configuration.name, configuration.text] for configuration in self.configurations
                ],
                "image_size": list(self.image_size),
                "class_names": list(self.objects.class_names),
                "scoring": asdict(self.objects.scoring),
                **{name: getattr(self, name) for name in _PLAIN},
            }
        )
        if path.suffix not in (".npz", ".safetensors"):
            raise SettingError(f"{path} has no known format: end its name in .npz or .safetensors")
        with output_errors(path), atomic_write(path) as file:
            if path.suffix == ".npz":
                np.savez_compressed(
                    file,
                    allow_pickle=False,
                    metadata=np.array(metadata),
                    **{k: v.numpy() for k, v in tensors.items()},
                )
            else:
                file.write(safetensors.torch.save(tensors, {"headoff": metadata}))
        return path


_TENSORS = (
    "maps", "queries", "labels", "values", "decoder_identity_rows", "encoder_identity_rows",
    "reference_differs", "logits", "boxes", "heads", "points", "tokens",
)  # fmt: skip
_OBJECT_TENSORS = ("queries", "labels", "scores", "boxes")
_PLAIN = ("layers", "shapes", "through_encoder", "stride", "resized", "method", "target", "pick", "zero_rows")


def load_explanation(path: str | Path) -> Explanation:
    """Read a file written by `Explanation.save`.

    Raises:
        SettingError: `path` is not such a file.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                tensors = {
                    name: torch.from_numpy(archive[name]) for name in archive.files if name != "metadata"
                }
                metadata = json.loads(str(archive["metadata"]))
        else:
            from safetensors import safe_open

            with safe_open(path, "pt") as archive:
                tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
                metadata = json.loads(archive.metadata()["headoff"])
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']!r}")
        rest: dict[str, Any] = {name: tensors.get(name) for name in _TENSORS}
        rest |= {
            name: tuple(value) if isinstance(value := metadata[name], list) else value for name in _PLAIN
        }
        rest["shapes"] = tuple(map(tuple, rest["shapes"]))
        objects = Detections(
            **{name: tensors[f"objects.{name}"] for name in _OBJECT_TENSORS},
            image_size=tuple(metadata["image_size"]),
            class_names=tuple(metadata["class_names"]),
            scoring=Scoring(**metadata.get("scoring", {})),
        )
        return Explanation(
            configurations=tuple(
                parse_configuration(text).named(name) for name, text in metadata["configurations"]
            ),
            objects=objects,
            **rest,
        )
    except Exception as error:
        raise SettingError(
            f"{path} cannot be read as an explanation ({error_line(error)}): give a file that Explanation.save wrote"
        ) from error


def _without_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if values != values else values
