"""The images of a data set in which most is lost: which they are, how they are shown, how their sweeps are opened."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw

from headoff.errors import ImageError
from headoff.evaluation.importance import head_scores
from headoff.evaluation.outcomes import STATUSES, Assignment, Objects, assign
from headoff.evaluation.scores import Scores, SourceOfDetections
from headoff.evaluation.sources import Files, Scenes
from headoff.figures.evaluation import cumulative_in
from headoff.gates import Configuration, CumulativeSweep, sweeps_among
from headoff.outcomes import Status
from headoff.report.evaluation_story import costliest
from headoff.report.page import data_uri
from headoff.wording import counted

WORST = 8
"""Images that are shown of those in which most is lost."""

_SIDE = 420
_OBJECT_COLOURS = {
    Status.KEPT: "#009988",
    Status.MOVED: "#33BBEE",
    Status.DUPLICATED: "#7E57C2",
    Status.RELABELLED: "#DDAA33",
    Status.LOST: "#CC3311",
}


class Pictures(Protocol):
    """Images by their index, such as `headoff.evaluation.sources.Files`."""

    def load(self, index: int) -> tuple[Image.Image, str]: ...


@dataclass(frozen=True)
class ImageLosses:
    """The images in which most AP is lost under a configuration.

    Attributes:
        configuration: its index.
        images: indices of images, the most lost first.
        losses: what each contributes to the AP lost.
        counts: for each image its true objects by what becomes of them (`STATUSES`).
    """

    configuration: int
    images: list[int]
    losses: list[float]
    counts: list[list[int]]


def worst_images(source: SourceOfDetections, scores: Scores, configuration: int) -> ImageLosses:
    """The images in which most AP is lost under a configuration."""
    losses = scores.image_losses(configuration)
    order = np.argsort(-np.nan_to_num(losses, nan=-np.inf), kind="stable")[:WORST]
    images = [int(index) for index in order if losses[index] > 0]
    objects = Objects.true(scores.truth, np.array(images, np.int64))
    found = Objects.detected(source.detections(configuration), scores.confidence)
    status = assign(objects, found).status
    counts = [
        np.bincount(status[objects.image == index], minlength=len(STATUSES)).tolist() for index in images
    ]
    return ImageLosses(configuration, images, [float(losses[index]) for index in images], counts)


def telling_configurations(scores: Scores) -> list[int]:
    """The configurations whose worst images are shown: half of the heads off, and the single head that costs most."""
    chosen = []
    cumulative = cumulative_in(scores)
    if cumulative:
        chosen.append(cumulative[len(cumulative) // 2])
    single = [found for found in head_scores(scores) if found.layers]
    if single:
        _, layer, head = costliest(single)
        texts = [one.configuration.text for one in scores.configurations]
        for text in (f"L{layer}H{head}", f"{single[0].site} L{layer}H{head}"):
            if text in texts:
                chosen.append(texts.index(text))
    if not chosen and len(scores) > 1:
        chosen.append(max(range(1, len(scores)), key=lambda index: scores.loss(index)[0]))
    return list(dict.fromkeys(chosen))


def cards_of(
    folder: Path,
    source: SourceOfDetections,
    scores: Scores,
    group: ImageLosses,
    pictures: Pictures | None,
    command: Callable[[int, int], str] | None,
    open_sweep: Callable[[int, int], Path] | None,
) -> dict[str, Any]:
    """What the page shows of a group; for the arguments see `headoff.report.evaluation.write_summary`."""
    name = scores.configurations[group.configuration].configuration.name
    total = scores.loss(group.configuration)[0]
    cards = []
    table = source.detections(group.configuration)
    for image, loss, counts in zip(group.images, group.losses, group.counts, strict=True):
        became = ", ".join(f"{n} {status.value}" for n, status in zip(counts, STATUSES, strict=True) if n)
        share = f"{loss / total:.1%} of the AP lost. " if total > 0 else ""
        thumbnail = page = ""
        try:
            if pictures is not None:
                thumbnail = _thumbnail(pictures.load(image)[0], scores, image, table)
            if open_sweep is not None:
                page = open_sweep(image, group.configuration).relative_to(folder).as_posix()
        except ImageError:
            pass  # it was there when it was evaluated
        cards.append(
            {
                "name": scores.truth.names[image],
                "text": f"{share}{counted(sum(counts), 'object')}: {became or 'none'}",
                "thumbnail": thumbnail,
                "alt": f"{scores.truth.names[image]} with what becomes of its objects",
                "command": command(image, group.configuration) if command else "",
                "page": quote(page),
            }
        )
    legend = ", ".join(
        f"{colour} {status.value}"
        for status, colour in zip(Status, ("green", "blue", "violet", "yellow", "red"), strict=True)
    )
    return {
        "title": f"Where most is lost: {name}",
        "note": f"Images by what they contribute to the AP lost. True objects: {legend}; dashed: detections above a "
        f"score of {scores.confidence:g} that belong to none.",
        "cards": cards,
    }


def _thumbnail(picture: Image.Image, scores: Scores, image: int, table: Any) -> str:
    """The image with its true objects in the colours of what became of them, as a data URI."""
    scale = _SIDE / max(picture.size)
    small = picture.convert("RGB").resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))),
        Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC,
    )
    rows = table.image == image
    here = type(table)(
        table.image[rows], table.scores[rows], table.labels[rows], table.boxes[rows], table.queries[rows]
    )
    objects, found = Objects.true(scores.truth, np.array([image])), Objects.detected(here, scores.confidence)
    assigned: Assignment = assign(objects, found)
    draw = ImageDraw.Draw(small)
    for box in found.boxes[assigned.owner < 0]:
        _dashed(draw, (box * scale).tolist())
    for box, status in zip(objects.boxes, assigned.status, strict=True):
        left, top, right, bottom = (box * scale).tolist()
        sides = (left, top, max(left, right), max(top, bottom))
        draw.rectangle(sides, outline="white", width=5)
        draw.rectangle(sides, outline=_OBJECT_COLOURS[STATUSES[status]], width=4)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return data_uri("webp", buffer.getvalue())


def _dashed(draw: ImageDraw.ImageDraw, box: list[float]) -> None:
    left, top, right, bottom = box
    for start in np.arange(left, right, 8):
        for y in (top, bottom):
            draw.line((start, y, min(start + 4, right), y), fill="white", width=2)
    for start in np.arange(top, bottom, 8):
        for x in (left, right):
            draw.line((x, start, x, min(start + 4, bottom)), fill="white", width=2)


def opened_with(configurations: Sequence[Configuration], configuration: int) -> list[int]:
    """What is in the sweep of an image in which `configuration` costs much: the cumulative sweep if it has that, else
    the baseline and that.
    """
    for kind, indices in sweeps_among(configurations):
        if isinstance(kind, CumulativeSweep) and configuration in indices:
            return list(indices)
    return [0, configuration]


def sweep_command(pictures: object, image: int, name: str, model: str, configuration: str) -> str:
    """The command that opens the sweep of an image; of a scene, after it is drawn."""
    drawn = ""
    if isinstance(pictures, Scenes):
        seed = pictures.first_seed + image
        drawn = (
            f"headoff scenes draw --count 1 --first-seed {seed} --size {pictures.side} --out scene-{seed} && "
        )
        name = f"scene-{seed}/scene-000.png"
    elif isinstance(pictures, Files):
        name = str(pictures.path(image))
    named = f" --model {shlex.quote(model)}" if model else ""
    chosen = "" if configuration == "none" else f" --off {shlex.quote(configuration)}"
    return f"{drawn}headoff sweep {shlex.quote(name)}{named}{chosen}"
