"""Causal agreement: whether a map loses relevance where switching heads off loses the detection.

Heads are switched off in C random configurations. For an object, let v_c be its value under configuration c, the
probability of its class at its query, and m_c the relevance of its map under c: that inside the detected box, its
share of all (of all absolute numbers, where some are negative), or all of it. *Agreement* is Spearman's rank
correlation over the configurations between m_c and v_c; as ranks do not change when a constant is subtracted, it is
that between the changes m_c - m_0 and v_c - v_0 from nothing off. 1: the more a configuration harms the detection,
the less relevance is left. 0: none of that, as for a map that does not change.

All configurations switch the same number of heads off in every layer. Otherwise a map that only counts heads would
agree: with more of them off there is less attention, and less of a detection. And as they are independent draws, they
can be exchanged, so a permutation of the values among them is the null hypothesis: of P seeded permutations

    p = (1 + number with at least the observed correlation) / (1 + P)
    z = (observed - mean) / standard deviation

The relevance of methods with negative numbers is their sum: evidence less evidence against.

It needs no true objects and takes nothing away from the image, so nothing the model has never seen. But it asks one
question only: about heads, and not whether the map has the right place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headoff.errors import SettingError
from headoff.faithfulness.explained import ExplainedImage
from headoff.faithfulness.measures import Measure, Quantity, Scores, register_measure
from headoff.faithfulness.ranks import centred_ranks, rank_correlation
from headoff.gates import DEFAULT_SITE, Configuration, HeadLayout, Site, off_matrix
from headoff.values import resolve_value

CONFIGURATIONS = 32
"""Default number of configurations."""
SHARE = 0.5
"""Default share of the heads of a layer that is off."""
PERMUTATIONS = 999
"""Of the null hypothesis."""


def random_configurations(
    layout: HeadLayout, count: int, share: float, site: Site, generator: torch.Generator
) -> tuple[Configuration, ...]:
    """Configurations with `share` of the heads of every layer off, drawn at random; at least one is off and one on."""
    heads = layout.heads_at(site)
    off = min(max(1, round(share * heads)), heads - 1)
    found = []
    for _ in range(count):
        order = torch.rand(layout.layers(site), heads, generator=generator).argsort(1)
        found.append(off_matrix((order < off).int().tolist(), site=site))
    return tuple(found)


class CausalAgreement(Measure):
    """Rank correlation of relevance and value over configurations of heads; see the module.

    Args:
        count: of configurations.
        share: of the heads of every layer that is off.
        site: where.
        value: one of `headoff.choices.VALUES` that has a number for each object.

    Raises:
        SettingError: there are too few configurations, or another argument is invalid.
    """

    name = "causal"
    summary = "rank correlation over random configurations of heads between a map's relevance and the detection's value"
    quantities = (
        Quantity("box", "agreement of the relevance in the detected box", "higher", "correlation", (-1, 1)),
        Quantity("share", "agreement of the share of relevance in the box", "higher", "correlation", (-1, 1)),
        Quantity("total", "agreement of all relevance", "higher", "correlation", (-1, 1)),
        Quantity(
            "box_z", "that in the box, in standard deviations of the null", "neither", "z", (-np.inf, np.inf)
        ),
        Quantity("box_p", "p of that in the box against the null", "neither", "p"),
    )

    def __init__(
        self,
        count: int = CONFIGURATIONS,
        share: float = SHARE,
        site: Site = DEFAULT_SITE,
        value: str = "probability",
    ) -> None:
        if count < 4:
            raise SettingError(
                f"{count} configurations have no rank correlation to speak of: give at least 4"
            )
        if not 0 < share < 1:
            raise SettingError(f"a share of {share} of the heads cannot be off: give one between 0 and 1")
        if resolve_value(value).of_image:
            raise SettingError(f"{value} is one number for the image: use probability, logit, iou or found")
        self.count, self.share, self.site, self.value = count, share, site, value

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "share": self.share,
            "site": self.site,
            "value": self.value,
            "permutations": PERMUTATIONS,
        }

    def scores(self, image: ExplainedImage, methods: Sequence[str]) -> dict[str, Scores]:
        layout = image.detector.head_layout
        drawn = random_configurations(
            layout, self.count, self.share, self.site, image.generator("causal", self.site)
        )
        configurations = tuple(image.configuration & one for one in drawn)
        values = image.values(configurations, self.value).T  # (O, C)
        cover = torch.stack([image.grid.cover(box) for box in image.objects.detections.boxes.double()])
        found = {}
        for method in methods:
            maps = image.explain(method, configurations)  # (C, O, h, w)
            in_box, total = (maps * cover).sum((-2, -1)).T, maps.sum((-2, -1)).T
            size = maps.abs().sum((-2, -1)).T
            share = in_box / torch.where(size > 0, size, 1)
            (box, z, p), (of_share, *_), (of_total, *_) = (
                agreement(relevance, values, image.generator("null")) for relevance in (in_box, share, total)
            )
            found[method] = Scores(torch.stack((box, of_share, of_total, z, p), dim=-1))
        return found


def agreement(
    relevance: Tensor, values: Tensor, generator: torch.Generator, permutations: int = PERMUTATIONS
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank correlation, z and p, (O,) each, of relevance (O, C) and values (O, C) over C configurations.

    Where one of them is the same under all configurations, up to rounding, they are 0, 0 and 1.
    """
    relevance, values = _without_rounding(relevance), _without_rounding(values)
    observed = rank_correlation(relevance, values)
    x, y = centred_ranks(relevance), centred_ranks(values)
    orders = torch.rand(permutations, relevance.shape[-1], generator=generator).argsort(-1)
    scale = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    null = torch.einsum("oc,opc->op", x, y[:, orders]) / torch.where(scale > 0, scale, torch.inf)[:, None]
    # What is equal but for rounding counts.
    p = (1 + (null >= observed[:, None] - 1e-9).double().sum(-1)) / (1 + permutations)
    spread = null.std(-1)
    z = (observed - null.mean(-1)) / torch.where(spread > 0, spread, torch.inf)
    return observed, z, p


def _without_rounding(x: Tensor) -> Tensor:
    """Differences that are rounding errors of float32 have no ranks."""
    greatest = x.abs().amax(-1, keepdim=True)
    spread = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    return torch.where(spread > 1e-5 * greatest, x, 0.0)


register_measure(CausalAgreement.name, CausalAgreement)
