"""Reference sets: contexts of every head over a set of images, which replace those of heads that are off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from headoff.calls import Attend, AttentionAddress, AttentionCall
from headoff.choices import SITES, Site
from headoff.detector import Detector
from headoff.detr.checkpoints.files import read_tensors
from headoff.errors import AttentionError, CheckpointError, ImageError, SettingError
from headoff.files import write_file
from headoff.images import ImageSource, load_image

FORMAT = "headoff references 1"
SAMPLES = 16
"""Images whose contexts are stored for `resample`."""

TOKENS = 64
"""Encoder tokens that are stored of each of them, evenly spaced in raster order."""


@dataclass(frozen=True, eq=False, repr=False)
class References:
    """Contexts of every head of a detector over n images. Tensors are on the CPU.

    Attributes:
        fingerprint: of the detector's weights.
        images: hash of each image.
        mean: (layers, H, Q, D) float32 at the decoder's sites, (layers, H, 1, D) at `encoder_self`.
        samples: (K, layers, H, Q or `TOKENS`, D) float16, of the images `sampled`.
        sampled: K hashes.
        optimal: (layers, H, 1, D) float32 at each site that was fitted, see `fit_optimal`.
        provenance: for reports: model, images, and what the optimal constants were fitted for.
    """

    fingerprint: str
    images: tuple[str, ...]
    mean: Mapping[Site, Tensor]
    samples: Mapping[Site, Tensor]
    sampled: tuple[str, ...]
    optimal: Mapping[Site, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        fitted = ", ".join(self.optimal)
        return f"<References of {len(self.images)} images{f', optimal at {fitted}' if fitted else ''}>"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically.

        Raises:
            OutputError: it cannot be written.
        """
        tensors = {
            f"{name}.{site}": tensor.contiguous()
            for name in ("mean", "samples", "optimal")
            for site, tensor in getattr(self, name).items()
        }
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "images": json.dumps(self.images),
            "sampled": json.dumps(self.sampled),
            "provenance": json.dumps(dict(self.provenance), sort_keys=True),
        }
        write_file(Path(path), safetensors.torch.save(tensors, metadata))


def load_references(path: str | Path) -> References:
    """Read the file of a reference set.

    Raises:
        SettingError: there is no such file, or it is another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingError(f"there is no reference set {str(path)!r}: check the path, or gather one")
    try:
        file = read_tensors(path)
        metadata = file.metadata
        if metadata.get("format") != FORMAT:
            raise ValueError("it has another format")
        parts: dict[str, dict[Site, Tensor]] = {"mean": {}, "samples": {}, "optimal": {}}
        for name, tensor in file.tensors.items():
            part, _, site = name.partition(".")
            parts[part][next(known for known in SITES if known == site)] = tensor
        if not parts["mean"] or set(parts["mean"]) != set(parts["samples"]):
            raise ValueError("a site is missing")
        return References(
            metadata["fingerprint"],
            tuple(json.loads(metadata["images"])),
            parts["mean"],
            parts["samples"],
            tuple(json.loads(metadata["sampled"])),
            parts["optimal"],
            dict(json.loads(metadata["provenance"])),
        )
    except (CheckpointError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise SettingError(
            f"{str(path)!r} is no reference set ({str(error) or 'unknown names'}): gather one with `headoff references`"
        ) from error


def gather_references(
    detector: Detector,
    images: Sequence[ImageSource],
    *,
    samples: int = SAMPLES,
    progress: Callable[[int, int], None] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> References:
    """Mean and sampled contexts of every head, at every site, with everything on, in one pass over the images.

    Every image runs alone, so there is no padding in the means; every image has the same weight.

    Args:
        detector: its `replacement` must be None.
        images: different images.
        samples: how many of them are stored for `resample`; they are evenly spaced in `images`.
        progress: called with (number of finished images, number of images).
        provenance: is stored in the file.

    Raises:
        ImageError: there are no images, or one cannot be read.
        SettingError: `samples` is below 1.
    """
    if not len(images):
        raise ImageError("a reference set needs images, and there are none: name a folder of images")
    if samples < 1:
        raise SettingError(f"{samples} images cannot be sampled: give at least 1")
    kept = {round(x) for x in torch.linspace(0, len(images) - 1, min(samples, len(images))).tolist()}
    sums: dict[AttentionAddress, Tensor] = {}
    stored: dict[AttentionAddress, list[Tensor]] = {}
    hashes = []
    for index, source in enumerate(images):
        picture = load_image(source)
        hashes.append(hash_of_image(picture))
        contexts: dict[AttentionAddress, Tensor] = {}

        def record(call: AttentionCall, proceed: Attend, contexts=contexts) -> Tensor:
            context = contexts[call.address] = proceed(call)
            return context

        with torch.inference_mode(), detector.intercepting(record):
            pixels, _ = detector.preprocess([picture])
            detector.decode(detector.encode(pixels))
        for address, (context,) in contexts.items():  # one image, one run: (H, T, D)
            if not context.isfinite().all():
                raise AttentionError(
                    f"the context of {address.site} layer {address.layer} is not finite: check the attention and the "
                    "weights, or take another dtype"
                )
            is_encoder = address.site == "encoder_self"
            mean = context.double().mean(1, keepdim=True) if is_encoder else context.double()
            sums[address] = sums.get(address, 0) + mean.cpu()
            if index in kept:
                rows = torch.arange(TOKENS) * context.shape[1] // TOKENS if is_encoder else slice(None)
                stored.setdefault(address, []).append(context[:, rows].to("cpu", torch.float16))
        if progress is not None:
            progress(index + 1, len(images))

    sites = [site for site in SITES if detector.head_layout.layers(site)]

    def at(site: Site, of: Callable[[AttentionAddress], Tensor]) -> list[Tensor]:
        return [of(AttentionAddress(site, layer)) for layer in range(detector.head_layout.layers(site))]

    return References(
        fingerprint_of(detector),
        tuple(hashes),
        {site: torch.stack(at(site, lambda a: (sums[a] / len(images)).float())) for site in sites},
        {site: torch.stack(at(site, lambda a: torch.stack(stored[a])), dim=1) for site in sites},
        tuple(hashes[index] for index in sorted(kept)),
        provenance=dict(provenance or {}),
    )


def hash_of_image(image: ImageSource) -> str:
    """SHA-256 of an image's size and pixels, so that the same picture in another file is known."""
    picture = load_image(image)
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def fingerprint_of(detector: Detector) -> str:
    """SHA-256 of the weights of encoder, decoder and heads, in bfloat16: the same in all dtypes but float16."""
    total = hashlib.sha256()
    for name, tensor in sorted(detector.state_dict().items()):
        if "backbone." not in name:
            # numpy knows no bfloat16
            numbers = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
            total.update(f"{name} {tuple(tensor.shape)}".encode() + numbers.tobytes())
    return total.hexdigest()
