"""The ablation kinds as replacements, for one detector and one image."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headoff.ablation.references import References, fingerprint_of, hash_of_image, load_references
from headoff.calls import AttentionAddress, AttentionCall, Replacement
from headoff.choices import ABLATION_KINDS, AblationKind, Site
from headoff.detector import Detector
from headoff.errors import SettingError, did_you_mean
from headoff.images import ImageSource
from headoff.scenes.samples import bundled_references

NEEDS_REFERENCES = ("mean", "resample", "optimal")


@dataclass(frozen=True, eq=False)
class Ablation:
    """What heads that are off contribute, for one detector.

    Attributes:
        kind: for reports.
        replacement: see `Detector.replacing`; None for zero.
    """

    kind: AblationKind
    replacement: Replacement | None = None

    def applied_to(self, detector: Detector) -> AbstractContextManager[None]:
        """Within this context, heads of `detector` that are off contribute the replacement."""
        return detector.replacing(self.replacement)


def make_ablation(
    kind: AblationKind | Ablation,
    detector: Detector,
    references: References | str | Path | None = None,
    image: ImageSource | None = None,
) -> Ablation:
    """The ablation of that kind; for `resample` the first of `ablation_draws`. See there for arguments and errors.

    An `Ablation` is returned as it is.
    """
    if isinstance(kind, Ablation):
        return kind
    return ablation_draws(kind, detector, references, image)[0]


def ablation_draws(
    kind: AblationKind | str,
    detector: Detector,
    references: References | str | Path | None = None,
    image: ImageSource | None = None,
) -> tuple[Ablation, ...]:
    """The ablation of that kind: for `resample` one for each sampled image, to be averaged over; else just one.

    Args:
        kind: see `headoff.ablation`.
        detector: whose heads are switched off.
        references: the reference set of `mean`, `resample` and `optimal`, or its file; for the bundled model there is
            a bundled one.
        image: the image that is judged. It is never drawn by `resample`.

    Raises:
        SettingError: the kind is unknown; there is no reference set, or it was made with another model, at other
            layers, or has no optimal constants; the optimal constants were fitted on `image`, or `resample` has no
            other image.
    """
    if kind not in ABLATION_KINDS:
        raise SettingError(
            f"there is no ablation kind {kind!r}{did_you_mean(kind, ABLATION_KINDS)}: use one of "
            f"{', '.join(ABLATION_KINDS)}"
        )
    if kind == "zero":
        return (Ablation("zero"),)
    if kind == "uniform":
        return (Ablation("uniform", attend_uniformly),)
    found = references_for(kind, detector, references)
    if kind == "mean":
        return (Ablation("mean", ConstantReplacement(found.mean, detector)),)
    judged = None if image is None else hash_of_image(image)
    if kind == "resample":
        others = [index for index, sampled in enumerate(found.sampled) if sampled != judged]
        if not others:
            raise SettingError(
                "the reference set has no image other than the one that is judged, so nothing can be resampled: "
                "gather it from more images"
            )
        return tuple(
            Ablation(
                "resample",
                ConstantReplacement({s: x[index] for s, x in found.samples.items()}, detector),
            )
            for index in others
        )
    if not found.optimal:
        raise SettingError(
            "the reference set has no optimal constants: fit them, with `headoff references --optimal` or "
            "headoff.ablation.fit_optimal"
        )
    if judged in found.images:
        raise SettingError(
            "the optimal constants were fitted on the image that is judged: judge another image, or fit them on others"
        )
    return (Ablation("optimal", ConstantReplacement(found.optimal, detector)),)


def attend_uniformly(call: AttentionCall) -> Tensor:
    """The context of attention spread evenly over all keys that are not masked: (B, H, 1, D)."""
    if call.attn_mask is None:
        return call.value.mean(-2, keepdim=True)
    keys = call.attn_mask.to(call.value.dtype)  # the model's masks are bool, (B, 1, 1, S)
    return (keys @ call.value) / keys.sum(-1, keepdim=True).clamp(min=1)


class ConstantReplacement:
    """Contexts that do not depend on the call's inputs.

    Args:
        contexts: for each site (layers, H, rows, D): rows are the decoder's queries or the encoder's tokens in raster
            order, or 1 for all.
        detector: whose device and dtype are used.
    """

    def __init__(self, contexts: Mapping[Site, Tensor], detector: Detector) -> None:
        self._contexts = {
            AttentionAddress(site, layer): context
            for site, layers in contexts.items()
            for layer, context in enumerate(layers.to(detector.device, detector.dtype))
        }

    def __call__(self, call: AttentionCall) -> Tensor:
        address = call.address
        if address not in self._contexts:
            raise SettingError(
                f"the ablation has nothing for {address.site} of layer {address.layer}: gather a set with it, "
                f"for optimal constants by `headoff references FOLDER --optimal --site {address.site}`"
            )
        context, rows = self._contexts[address], call.rows
        if context.shape[1] == 1:
            return context[None]
        if address.site == "encoder_self":
            # Images differ in their numbers of tokens: a token takes that of the same fraction of the raster.
            index = torch.arange(rows, device=context.device) * context.shape[1] // rows
            return context[None, :, index]
        # Runs are concatenated along the query axis.
        return context.repeat(1, rows // context.shape[1], 1)[None]


def references_for(
    kind: AblationKind | str, detector: Detector, references: References | str | Path | None = None
) -> References:
    """The reference set that a kind of `NEEDS_REFERENCES` takes; for the bundled model there is a bundled one.

    Raises:
        SettingError: there is none, or it was made with another model.
    """
    if isinstance(references, References):
        found = references
    elif references is not None:
        found = load_references(references)
    else:
        bundled = load_references(bundled_references())
        if bundled.fingerprint != fingerprint_of(detector):
            raise SettingError(
                f"{kind} ablation needs a reference set for this model: gather one from a folder of images, with "
                "`headoff references FOLDER --model ...` or headoff.ablation.gather_references, and give it as "
                "--references or references="
            )
        return bundled
    if found.fingerprint != fingerprint_of(detector):
        raise SettingError(
            f"the reference set was gathered with another model ({found.provenance.get('model', 'unnamed')}): "
            "gather one with this model"
        )
    return found
