"""The configurations that the options ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from headoff.choices import DEFAULT_SITE, Site
from headoff.detector import Detector
from headoff.errors import GateError, SettingError
from headoff.gates import (
    Configuration,
    Order,
    OrderResolver,
    all_subsets,
    check_order,
    check_site_exists,
    cumulative,
    none_off,
    parse_configuration,
    parse_order,
    read_configurations,
    single_heads,
)
from headoff.importance import heads
from headoff.importance.curves import RemovalCurves
from headoff.sweeps import query_of_object


@dataclass(frozen=True)
class ConfigurationChoice:
    """The options about configurations, before the detector, and so its number of heads, is known.

    Attributes:
        set: `cumulative`, `single`, `subsets`, or None for the baseline only.
        site: where `set` switches heads off.
        off: configurations given by --off; they replace `set`.
        order: order of heads in the cumulative sweep, or None.
        by_importance: which heads the cumulative sweep switches off first, or None; their order is that of an image.
    """

    set: str | None
    site: Site
    off: tuple[Configuration, ...]
    order: OrderResolver | None
    by_importance: Literal["least", "most"] | None = None

    @classmethod
    def from_options(cls, settings: argparse.Namespace) -> ConfigurationChoice:
        """Read the options of `add_configuration_options`.

        Raises:
            GateError: a configuration or an order cannot be read.
            SettingError: options contradict each other.
        """
        order, by_importance = read_order(settings.order)
        off = tuple(parse_configuration(text) for text in settings.off or ())
        if settings.order and (off or settings.set != "cumulative"):
            raise SettingError("--order needs the cumulative sweep: give it with --set cumulative only")
        if settings.site != DEFAULT_SITE and off:
            raise SettingError(
                f"--site does not apply to --off; write the site in it: --off '{settings.site} ...'"
            )
        if settings.site != DEFAULT_SITE and settings.set is None:
            raise SettingError("--site says where --set switches heads off: give --set as well")
        return cls(settings.set, settings.site, off, order, by_importance)

    def ordered(self, order: Order) -> ConfigurationChoice:
        """The same, along an order."""
        return replace(self, order=lambda heads: check_order(order, heads)[0], by_importance=None)

    def configurations(self, detector: Detector) -> tuple[Configuration, ...]:
        """The configurations for a detector, the baseline first."""
        layout, site = detector.head_layout, self.site
        if self.off or self.set is None:
            return read_configurations((none_off(), *self.off))
        check_site_exists(layout, site, "--site")
        heads = layout.heads_at(site)
        if self.set == "single":
            return (none_off(), *single_heads(layout.layers(site), heads, site=site))
        if self.set == "subsets":
            return all_subsets(heads, site=site)
        return cumulative(heads, self.order(heads) if self.order else None, site=site)

    def for_image(
        self,
        detector: Detector,
        picture: Image.Image,
        settings: argparse.Namespace,
        objects: Sequence[int] = (),
    ) -> tuple[tuple[Configuration, ...], RemovalCurves | None]:
        """The configurations for an image, and for an order by importance how it compares with others. It is that of
        the Shapley values of the columns, by the class probability, averaged over these objects (all by default).
        """
        if self.by_importance is None:
            return self.configurations(detector), None
        found = heads(
            detector,
            picture,
            site=self.site,
            measures="shapley_columns",
            values="probability",
            ablations=settings.ablate,
            references=settings.references,
            confidence=settings.confidence,
        )
        for number in objects:
            query_of_object(found.objects, number)
        curves = found.curves(objects=objects or None)
        order = curves.most_order if self.by_importance == "most" else curves.least_order
        return cumulative(detector.head_layout.heads_at(self.site), order, site=self.site), curves


def read_order(text: str | None) -> tuple[OrderResolver | None, Literal["least", "most"] | None]:
    """--order: an order of heads, or which heads by their importance go off first; neither where it is not given.

    Raises:
        GateError: it cannot be read.
    """
    if not text:
        return None, None
    first = _IMPORTANCE.get(text)
    if first is None and text.startswith("importance:"):
        raise GateError(f"there is no order {text!r}: use importance:least or importance:most")
    return (None, first) if first else (parse_order(text), None)


_IMPORTANCE: dict[str, Literal["least", "most"]] = {
    "importance": "least",
    "importance:least": "least",
    "importance:most": "most",
}


def describe_ablation(settings: argparse.Namespace) -> dict[str, str]:
    """The options of `add_ablation_options` as part of a report's provenance; nothing for zero ablation.

    Raises:
        SettingError: --references has no effect.
    """
    if settings.references is not None and settings.ablate in ("zero", "uniform"):
        raise SettingError(
            f"--references has no effect on --ablate {settings.ablate}: leave it out, or --ablate mean, resample or "
            "optimal"
        )
    if settings.ablate == "zero":
        return {}
    source = f", references {settings.references}" if settings.references else ""
    return {"ablation": f"{settings.ablate}{source}"}


def describe_configurations(settings: argparse.Namespace) -> dict[str, str]:
    """The options of `add_configuration_options` as part of a report's provenance."""
    if settings.off:
        chosen = {"configurations": "; ".join(f"'{text}'" for text in settings.off)}
    else:
        chosen = {"configurations": f"{settings.set} at {settings.site}" if settings.set else "none off"}
    if settings.order:
        chosen["order"] = settings.order
    return chosen
