"""What heads are for, measured over images: what their removal does, and where they look.

A role is stated only where the data supports it: where the interval of the mean effect, over all heads and roles
together, lies beyond the smallest effect of interest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from headoff.ablation import References
from headoff.choices import DEFAULT_SITE, AblationKind, Site
from headoff.detector import Detector
from headoff.encoded import EncodedImage
from headoff.errors import SettingError
from headoff.images import ImageSource
from headoff.importance.attention import (
    STATISTICS,
    AttentionStatistics,
    attention_at_objects,
    attention_statistics,
)
from headoff.importance.games import Game
from headoff.importance.heads import heads as score_heads
from headoff.totals import LEVEL, bootstrap_means


@dataclass(frozen=True)
class Role:
    """A role of a head: what its removal does to a value.

    Attributes:
        name: of the role.
        value: see `headoff.values`.
        sign: of the score of a head that has the role: 1 if the value falls without it, -1 if it rises.
        least: the smallest effect of interest, in units of the value.
    """

    name: str
    value: str
    sign: int
    least: float


ROLES = (
    Role("class evidence", "logit", 1, 0.5),
    Role("box precision", "iou", 1, 0.05),
    Role("suppresses duplicates", "duplicates", -1, 0.05),
)


CLASS_IMAGES = 10
"""Images below which no role is stated for a class: a bootstrap of fewer has too narrow intervals."""


@dataclass(frozen=True)
class MeanOverImages:
    """The mean over n images of the mean over objects, arrays of any one shape.

    Attributes:
        mean: of the images.
        low, high: its interval at `LEVEL`, by a bootstrap over images.
        error: standard error by the same bootstrap.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray) -> MeanOverImages:
        """From (n, ...) images; NaN where an image has no value."""
        there = np.isfinite(images)
        filled = np.where(there, images, 0.0).reshape(len(images), -1)
        counts = there.reshape(len(images), -1).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means = bootstrap_means(filled, counts)
            mean = filled.sum(0) / counts.sum(0)
            low, high = np.nanquantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
            error = np.nanstd(means, axis=0)
        return cls(*(x.reshape(images.shape[1:]) for x in (mean, low, high, error)))


@dataclass(frozen=True)
class ClassEffects:
    """What the removal of a head from all layers costs the objects of a class.

    Attributes:
        images, objects: how many have or are one.
        effects: for each value of `ROLES`: (H,), means over images of means over their objects of the class.
    """

    images: int
    objects: int
    effects: dict[str, MeanOverImages]


@dataclass(frozen=True)
class HeadRoles:
    """Roles of the heads of a site over n images with objects. Arrays are float64.

    Attributes:
        site: where the heads are.
        shape: (L, H).
        images, objects: how many were used.
        ablation: what heads that are off contributed.
        effects: for each value of `ROLES`, what the removal of a head costs: (L, H).
        column_effects: the same for a head in all layers: (H,).
        attention: for each of `headoff.importance.attention.STATISTICS`: (L, H); empty at other sites than
            `decoder_cross`.
        agreement: (L, H, H), cosine similarity of the maps of two heads of a layer.
        across_objects, across_layers: (L, H) and (L - 1, H), see `AttentionStatistics`.
        classes: `column_effects` on the objects of one class, for each class of at least two images.
    """

    site: Site
    shape: tuple[int, int]
    images: int
    objects: int
    ablation: AblationKind
    effects: dict[str, MeanOverImages]
    column_effects: dict[str, MeanOverImages]
    attention: dict[str, MeanOverImages]
    agreement: MeanOverImages | None
    across_objects: MeanOverImages | None
    across_layers: MeanOverImages | None
    classes: dict[str, ClassEffects] = field(default_factory=dict)

    @property
    def quantile(self) -> float:
        """Standard errors on either side of a mean, so that all heads and roles together have the level `LEVEL`
        (Bonferroni).
        """
        return _quantile((self.shape[0] + 1) * self.shape[1] * len(ROLES))

    def roles(self, head: int, layer: int | None = None) -> tuple[Role, ...]:
        """The roles of a head of a layer, or of all layers together (None), that the data supports."""
        effects = self.column_effects if layer is None else self.effects
        return _supported(effects, (head,) if layer is None else (layer, head), self.quantile)

    def roles_for(self, class_name: str, head: int) -> tuple[Role, ...]:
        """The roles of a head of all layers together for the objects of a class, that the data supports for all heads,
        roles and classes together; none where the class is in fewer than `CLASS_IMAGES` images.
        """
        of = self.classes[class_name]
        if of.images < CLASS_IMAGES:
            return ()
        quantile = _quantile(len(self.classes) * self.shape[1] * len(ROLES))
        return _supported(of.effects, (head,), quantile)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each number: the columns of roles.csv. `layer` is `all` for a head in all layers."""
        layers, heads = self.shape

        def row(
            layer: int | str,
            head: int,
            quantity: str,
            of: MeanOverImages,
            at: tuple[int, ...],
            class_name: str = "",
        ) -> dict[str, Any]:
            numbers = {name: float(getattr(of, name)[at]) for name in ("mean", "low", "high")}
            return {"class": class_name, "layer": layer, "head": head, "quantity": quantity, **numbers}

        for head in range(heads):
            for name, estimate in self.column_effects.items():
                yield row("all", head, f"removal: {name}", estimate, (head,))
        for class_name, of in self.classes.items():
            for head in range(heads):
                for name, estimate in of.effects.items():
                    yield row("all", head, f"removal: {name}", estimate, (head,), class_name)
        for layer in range(layers):
            for head in range(heads):
                for name, estimate in self.effects.items():
                    yield row(layer, head, f"removal: {name}", estimate, (layer, head))
                for name, estimate in self.attention.items():
                    yield row(layer, head, f"attention: {name}", estimate, (layer, head))
                if self.agreement is not None:
                    for other in range(heads):
                        if other != head:
                            name = f"agreement: with head {other}"
                            yield row(layer, head, name, self.agreement, (layer, head, other))
                if self.across_objects is not None:
                    name = "agreement: of two objects"
                    yield row(layer, head, name, self.across_objects, (layer, head))
                if self.across_layers is not None and layer + 1 < layers:
                    name = "agreement: with the next layer"
                    yield row(layer, head, name, self.across_layers, (layer, head))

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON types; NaN becomes None."""

        def plain(of: MeanOverImages | None) -> Any:
            if of is None:
                return None
            return {
                name: [None if x != x else x for x in getattr(of, name).ravel().tolist()]
                for name in ("mean", "low", "high", "error")
            }

        layers, heads = self.shape
        return {
            "site": self.site,
            "layers": layers,
            "heads": heads,
            "images": self.images,
            "objects": self.objects,
            "ablation": self.ablation,
            "effects": {name: plain(of) for name, of in self.effects.items()},
            "column_effects": {name: plain(of) for name, of in self.column_effects.items()},
            "attention": {name: plain(of) for name, of in self.attention.items()},
            "agreement": plain(self.agreement),
            "across_objects": plain(self.across_objects),
            "across_layers": plain(self.across_layers),
            "classes": [
                {
                    "class": class_name,
                    "images": of.images,
                    "objects": of.objects,
                    "column_effects": {name: plain(effect) for name, effect in of.effects.items()},
                    "roles": [
                        [role.name for role in self.roles_for(class_name, head)] for head in range(heads)
                    ],
                }
                for class_name, of in self.classes.items()
            ],
            "roles": [
                [[role.name for role in self.roles(head, layer)] for head in range(heads)]
                for layer in (*range(layers), None)
            ],
        }


def head_roles(
    detector: Detector,
    images: Sequence[ImageSource],
    *,
    site: Site = DEFAULT_SITE,
    ablation: AblationKind = "zero",
    references: References | str | None = None,
    confidence: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> HeadRoles:
    """Measure what the heads of a site are for, over images.

    Args:
        detector: see `headoff.load`.
        images: different images; those without objects are left out.
        site: where the heads are. Where they look is measured at `decoder_cross` only.
        ablation, references: what heads that are off contribute, see `headoff.ablation`.
        confidence: score above which a query's prediction is an object.
        progress: called with (number of finished images, number of images).

    Raises:
        ImageError: an image cannot be read.
        SettingError: fewer than two images have objects, or another argument is invalid.
        NonFiniteError: a number is not finite.
    """
    values = tuple(role.value for role in ROLES)
    effects: dict[str, list[np.ndarray]] = {value: [] for value in values}
    columns: dict[str, list[np.ndarray]] = {value: [] for value in values}
    attention: dict[str, list[np.ndarray]] = {name: [] for name in STATISTICS}
    maps: dict[str, list[np.ndarray]] = {
        name: [] for name in ("agreement", "across_objects", "across_layers")
    }
    classes: dict[int, list[tuple[int, dict[str, np.ndarray]]]] = {}
    objects = 0
    for index, image in enumerate(images):
        encoded = EncodedImage.of(detector, image)
        found = score_heads(
            detector,
            encoded,
            site=site,
            measures=("removal", "removal_columns"),
            values=values,
            ablations=ablation,
            references=references,
            confidence=confidence,
        )
        if len(found.objects):
            objects += len(found.objects)
            for value in values:
                effects[value].append(found.mean_scores("removal", value).numpy())
                columns[value].append(found.mean_scores("removal_columns", value)[0].numpy())
            for label in found.objects.labels.unique().tolist():
                of_class = found.objects.labels == label
                means = {
                    value: found.get("removal_columns", value).scores[of_class, 0].mean(0).numpy()
                    for value in values
                }
                classes.setdefault(label, []).append((int(of_class.sum()), means))
            if site == "decoder_cross":
                statistics = _attention_in(detector, encoded, confidence)
                for name, of in statistics.by_name.items():
                    attention[name].append(of.nanmean(0).numpy())
                for name, per_image in maps.items():
                    per_image.append(getattr(statistics, name).numpy())
        if progress is not None:
            progress(index + 1, len(images))
    count = len(effects[values[0]])
    if count < 2:
        raise SettingError(
            f"roles need intervals over images, and only {count} of {len(images)} has an object: give more images, or "
            "lower the confidence"
        )

    def estimate(per_image: list[np.ndarray]) -> MeanOverImages:
        return MeanOverImages.of(np.stack(per_image))

    looked = site == "decoder_cross"
    return HeadRoles(
        site,
        (detector.head_layout.layers(site), detector.head_layout.heads_at(site)),
        count,
        objects,
        ablation,
        {name: estimate(of) for name, of in effects.items()},
        {name: estimate(of) for name, of in columns.items()},
        {name: estimate(of) for name, of in attention.items()} if looked else {},
        **{name: estimate(of) if looked else None for name, of in maps.items()},
        classes={
            detector.class_names[label]: ClassEffects(
                len(classes[label]),
                sum(count for count, _ in classes[label]),
                {value: estimate([means[value] for _, means in classes[label]]) for value in values},
            )
            for label in sorted(classes)
            if len(classes[label]) > 1
        },
    )


def _quantile(tests: int) -> float:
    return NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / tests)


def _supported(effects: dict[str, MeanOverImages], at: tuple[int, ...], quantile: float) -> tuple[Role, ...]:
    """The roles whose effect at a place lies so many standard errors beyond the smallest that counts."""
    return tuple(
        role
        for role in ROLES
        if role.sign * effects[role.value].mean[at] - quantile * effects[role.value].error[at] > role.least
    )


def _attention_in(detector: Detector, encoded: EncodedImage, confidence: float) -> AttentionStatistics:
    """Where heads look in an image that has objects."""
    objects = Game.of(detector, encoded, "decoder_cross", (), confidence).objects
    weights = attention_at_objects(detector, encoded, objects)
    grid, stride = encoded.features.grid, detector.stride(encoded.features)
    height, width = (count * stride / side for count, side in zip(grid, encoded.resized, strict=True))
    return attention_statistics(weights, objects.boxes, grid, (height, width))
