"""The summary of a results folder of `headoff evaluate`: summary.json, tables, figures and a page."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw

from headoff.errors import ImageError
from headoff.evaluation.importance import HeadScores, head_scores
from headoff.evaluation.orders import ImportanceOrder
from headoff.evaluation.outcomes import COUNTED, SIZES, STATUSES, Assignment, Objects, assign
from headoff.evaluation.precision import METRICS
from headoff.evaluation.relevance import SampleStatistics
from headoff.evaluation.scores import REFERENCES, Scores, SourceOfDetections
from headoff.evaluation.sources import Files, Scenes
from headoff.figures.evaluation import cumulative_in, evaluation_figures
from headoff.gates import Configuration, CumulativeSweep, order_of, sweeps_among
from headoff.outcomes import Status
from headoff.report.drawing import Drawing
from headoff.report.output import PAGE, SUMMARY, new_report
from headoff.report.page import data_uri, inline_svg, template
from headoff.report.tables import HEAD_TOTAL_COLUMNS, cells, csv_text
from headoff.wording import counted

SCHEMA_VERSION = 1
"""Version of summary.json. It changes when a key is renamed or removed or gets another meaning."""
CONTRIBUTIONS = "contributions.parquet"
WORST = 8
"""Images that are shown of those in which most is lost."""
MOST_ROWS = 60
"""Most configurations in the table of the page."""

_SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
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
        _, layer, head = _costliest(single)
        texts = [one.configuration.text for one in scores.configurations]
        for text in (f"L{layer}H{head}", f"{single[0].site} L{layer}H{head}"):
            if text in texts:
                chosen.append(texts.index(text))
    if not chosen and len(scores) > 1:
        chosen.append(max(range(1, len(scores)), key=lambda index: scores.loss(index)[0]))
    return list(dict.fromkeys(chosen))


def _costliest(single: list[HeadScores]) -> tuple[HeadScores, int, int]:
    found = max(single, key=lambda one: one.scores.max())
    row, column = np.unravel_index(int(found.scores.argmax()), found.scores.shape)
    return found, found.layers[row], found.heads[column]


def evaluation_headline(scores: Scores) -> str:
    """The verdict of the page, in one or two sentences."""
    low, high = scores.baseline.interval("AP")
    text = f"AP {scores.baseline['AP']:.3f}{_span(low, high)} with nothing off"
    cumulative = cumulative_in(scores)
    if cumulative:
        half = len(cumulative) // 2
        lost = scores.loss(cumulative[half])
        order = order_of([scores.configurations[index].configuration for index in cumulative])[:half]
        if order == tuple(range(len(order))):
            text += f"; the first {half} of {len(cumulative) - 1} heads off cost {_lost(lost)}"
        else:
            text += f"; {', '.join(f'H{head}' for head in order)} off cost {_lost(lost)}"
    text += "."
    single = [found for found in head_scores(scores) if found.layers]
    if single:
        found, layer, head = _costliest(single)
        row, column = found.layers.index(layer), found.heads.index(head)
        cost = float(found.scores[row, column]), float(found.low[row, column]), float(found.high[row, column])
        text += f" The single head that costs most is L{layer}H{head}: {_lost(cost)}."
    elif not cumulative and len(scores) > 1:
        worst = max(range(1, len(scores)), key=lambda index: scores.loss(index)[0])
        name = scores.configurations[worst].configuration.name
        text += f" Most is lost with {name}: {_lost(scores.loss(worst))}."
    return text


def _lost(loss: tuple[float, float, float]) -> str:
    return f"{_number(loss[0])}{_span(*loss[1:])}"


def _span(low: float, high: float) -> str:
    return "" if np.isnan(low) else f" ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}".replace("-", "−")


CONFIGURATION_COLUMNS = (
    *("configuration", "text", "images", "detections", *METRICS),
    *(f"AP_{name}" for name in ("low", "high", "lost", "lost_low", "lost_high")),
)
METRIC_COLUMNS = ("configuration", "text", "metric", "value", "low", "high", "lost", "lost_low", "lost_high")
CLASS_COLUMNS = (
    *("configuration", "text", "class", "objects"),
    *("AP", "low", "high", "lost", "lost_low", "lost_high"),
)
OUTCOME_COLUMNS = ("configuration", "text", "objects_are", "class", "size", "objects", *COUNTED)
RELEVANCE_COLUMNS = (
    *("configuration", "text", "images", "objects", "method", "quantity"),
    *("mean", "low", "high"),
)
FAITHFULNESS_COLUMNS = (
    *("configuration", "text", "images", "objects", "method", "measure", "quantity"),
    *("mean", "low", "high"),
)
RATE_COLUMNS = ("configuration", "text", "objects_are", "outcome", "rate", "low", "high")


def configuration_rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """One row for each configuration: all metrics, and the interval and loss of AP."""
    for index, one in enumerate(scores.configurations):
        low, high = one.interval("AP")
        lost, lost_low, lost_high = scores.loss(index)
        yield {
            **_named(scores, index),
            "images": len(scores.images),
            "detections": one.detections,
            **dict(zip(METRICS, map(float, one.metrics), strict=True)),
            "AP_low": low,
            "AP_high": high,
            "AP_lost": lost,
            "AP_lost_low": lost_low,
            "AP_lost_high": lost_high,
        }


def metric_rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """One row for each configuration and metric, with its interval and what is lost."""
    for index, one in enumerate(scores.configurations):
        for metric in METRICS:
            low, high = one.interval(metric)
            lost, lost_low, lost_high = scores.loss(index, metric)
            yield {
                **_named(scores, index),
                **{"metric": metric, "value": one[metric], "low": low, "high": high},
                **{"lost": lost, "lost_low": lost_low, "lost_high": lost_high},
            }


def class_rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """One row for each configuration and class that has objects."""
    objects = scores.baseline.outcomes["truth"].objects_by_class.sum(1)
    for index, one in enumerate(scores.configurations):
        for label in np.flatnonzero(~np.isnan(one.by_class)):
            yield {
                **_named(scores, index),
                "class": scores.truth.class_names[label],
                "objects": int(objects[label]),
                "AP": float(one.by_class[label]),
                "low": float(one.class_low[label]),
                "high": float(one.class_high[label]),
                "lost": float(scores.baseline.by_class[label] - one.by_class[label]),
                "lost_low": float(one.class_loss_low[label]),
                "lost_high": float(one.class_loss_high[label]),
            }


def outcome_rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """Counts of outcomes for each configuration: of all objects, of each size, of each class that occurs."""
    for index, one in enumerate(scores.configurations):
        for reference in REFERENCES:
            counts = one.outcomes[reference]
            parts = [("all", "all", counts.objects_by_class.sum(), counts.by_class.sum((0, 1)))]
            parts += [
                ("all", size, counts.objects_by_class[:, s].sum(), counts.by_class[:, s].sum(0))
                for s, size in enumerate(SIZES)
            ]
            parts += [
                (name, "all", counts.objects_by_class[k].sum(), counts.by_class[k].sum(0))
                for k, name in enumerate(scores.truth.class_names)
                if counts.objects_by_class[k].any() or counts.by_class[k].any()
            ]
            for name, size, objects, numbers in parts:
                yield {
                    **_named(scores, index),
                    **{"objects_are": reference, "class": name, "size": size, "objects": int(objects)},
                    **dict(zip(COUNTED, map(int, numbers), strict=True)),
                }


def rate_rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """Outcomes for one object, with intervals."""
    for index, one in enumerate(scores.configurations):
        for reference in REFERENCES:
            found = one.outcomes[reference]
            for place, outcome in enumerate(COUNTED):
                yield {
                    **_named(scores, index),
                    **{"objects_are": reference, "outcome": outcome, "rate": float(found.rates[place])},
                    **{"low": float(found.low[place]), "high": float(found.high[place])},
                }


def head_rows(scores: Scores, ablation: str) -> Iterator[dict[str, Any]]:
    """What heads contribute to AP, with the columns of heads.csv of a folder of `headoff heads`."""
    for found in head_scores(scores):
        for row in found.rows():
            yield {"images": len(scores.images), "of": "data set", "ablation": ablation, **row}


def _named(scores: Scores, index: int) -> dict[str, str]:
    configuration = scores.configurations[index].configuration
    return {"configuration": configuration.name, "text": configuration.text}


def write_summary(
    folder: Path,
    source: SourceOfDetections,
    scores: Scores,
    *,
    provenance: Mapping[str, str],
    skipped: Mapping[int, str] | None = None,
    ablation: str = "zero",
    orders: Sequence[ImportanceOrder] = (),
    relevance: SampleStatistics | None = None,
    faithfulness: SampleStatistics | None = None,
    pictures: Pictures | None = None,
    command: Callable[[int, int], str] | None = None,
    open_sweep: Callable[[int, int], Path] | None = None,
    drawing: Drawing | None = None,
) -> Path:
    """Write the summary into `folder`, and return the path of its page, or of summary.json without one.

    Args:
        folder: of the results, or another one.
        source: the detections, of which those in the worst images are drawn.
        scores: of `headoff.evaluation.scores.score`.
        provenance: how the results were made.
        skipped: why images were left out, by index.
        ablation: what heads that are off contribute.
        orders: those of cumulative sweeps by importance.
        relevance, faithfulness: statistics of a sample of images.
        pictures: the images, for thumbnails.
        command: what to run to see an image's sweep, of the index of an image and of a configuration.
        open_sweep: writes the sweep of an image within `folder`, of the same indices, and returns the path of its page.
        drawing: which figures; by default the page.

    Raises:
        OutputError: a file cannot be written.
    """
    drawing = drawing or Drawing()
    groups = [worst_images(source, scores, index) for index in telling_configurations(scores)]
    left_out = {scores.truth.names[index]: reason for index, reason in (skipped or {}).items()}
    tables: dict[str, tuple[tuple[str, ...], Iterator[dict[str, Any]]]] = {
        "configurations.csv": (CONFIGURATION_COLUMNS, configuration_rows(scores)),
        "metrics.csv": (METRIC_COLUMNS, metric_rows(scores)),
        "classes.csv": (CLASS_COLUMNS, class_rows(scores)),
        "outcomes.csv": (OUTCOME_COLUMNS, outcome_rows(scores)),
        "rates.csv": (RATE_COLUMNS, rate_rows(scores)),
        "heads.csv": (HEAD_TOTAL_COLUMNS, head_rows(scores, ablation)),
    }
    if relevance is not None:
        tables["relevance.csv"] = (RELEVANCE_COLUMNS, relevance.rows())
    if faithfulness is not None:
        tables["faithfulness.csv"] = (FAITHFULNESS_COLUMNS, faithfulness.rows())
    with new_report(folder) as write:
        for name, (columns, rows) in tables.items():
            write(name, csv_text(columns, map(cells, rows)))
        _write_contributions(write.path(CONTRIBUTIONS), scores)
        charts = []
        if drawing.figures != "none":
            for stem, caption, figure in evaluation_figures(scores, relevance, faithfulness):
                if drawing.figures == "all":
                    buffer = io.BytesIO()
                    drawing.save(figure, buffer)
                    write(f"figures/{stem}.{drawing.format}", buffer.getvalue())
                charts.append({"caption": caption, "svg": inline_svg(figure.axes[0], f"chart-{stem}")})
            files = (*write.files, SUMMARY)
            page = _page(
                folder,
                source,
                scores,
                groups,
                charts,
                files,
                provenance,
                left_out,
                orders,
                pictures,
                command,
                open_sweep,
            )
            write(PAGE, page)
        write(
            SUMMARY,
            summary_json(
                scores, groups, provenance, left_out, ablation, write.files, orders, relevance, faithfulness
            ),
        )
    return folder / (SUMMARY if drawing.figures == "none" else PAGE)


def summary_json(
    scores: Scores,
    groups: list[ImageLosses],
    provenance: Mapping[str, str],
    skipped: Mapping[str, str],
    ablation: str,
    files: list[str],
    orders: Sequence[ImportanceOrder] = (),
    relevance: SampleStatistics | None = None,
    faithfulness: SampleStatistics | None = None,
) -> str:
    """The contents of summary.json."""
    contents = {
        "schema": "headoff.evaluation",
        "schema_version": SCHEMA_VERSION,
        "verdict": evaluation_headline(scores),
        "provenance": dict(provenance),
        "files": list(files),
        "images": len(scores.images),
        "skipped": dict(skipped),
        "objects": scores.baseline.outcomes["truth"].objects,
        "resamples": scores.resamples,
        "confidence": scores.confidence,
        "ablation": ablation,
        "orders": [one.as_dict() for one in orders],
        "configurations": [
            {
                **row,
                "outcomes": {
                    reference: dict(zip(COUNTED, map(float, one.outcomes[reference].rates), strict=True))
                    for reference in REFERENCES
                },
            }
            for row, one in zip(configuration_rows(scores), scores.configurations, strict=True)
        ],
        "heads": [
            {
                "site": found.site,
                "measure": found.measure,
                "layers": list(found.layers) or "all",
                "heads": list(found.heads),
                "scores": found.scores.tolist(),
                "low": found.low.tolist(),
                "high": found.high.tolist(),
                "interactions": None if found.interactions is None else found.interactions.tolist(),
                "on": found.on,
                "off": found.off,
            }
            for found in head_scores(scores)
        ],
        "relevance": None if relevance is None else list(relevance.rows()),
        "faithfulness": None if faithfulness is None else list(faithfulness.rows()),
        "worst_images": [
            {
                **_named(scores, group.configuration),
                "images": [
                    {
                        "name": scores.truth.names[image],
                        "id": int(scores.truth.image_ids[image]),
                        "ap_lost": loss,
                        "outcomes": dict(zip(COUNTED, counts, strict=False)),
                    }
                    for image, loss, counts in zip(group.images, group.losses, group.counts, strict=True)
                ],
            }
            for group in groups
        ],
    }
    return json.dumps(_without_nan(contents), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    """With None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _write_contributions(path: Path, scores: Scores) -> None:
    """What each image contributes to the AP of each configuration, a column each; a column's sum is the AP."""
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {
        "image_id": scores.truth.image_ids[scores.images],
        "name": [scores.truth.names[index] for index in scores.images],
    }
    for one in scores.configurations:
        item = one["AP"] / len(scores.images) + one.influence[scores.images]
        columns[one.configuration.text] = item.astype(np.float32)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _page(
    folder: Path,
    source: SourceOfDetections,
    scores: Scores,
    groups: list[ImageLosses],
    charts: list[dict[str, str]],
    files: tuple[str, ...],
    provenance: Mapping[str, str],
    skipped: Mapping[str, str],
    orders: Sequence[ImportanceOrder],
    pictures: Pictures | None,
    command: Callable[[int, int], str] | None,
    open_sweep: Callable[[int, int], Path] | None,
) -> str:
    rows = []
    costs = [scores.loss(index) for index in range(len(scores))]
    by_cost = sorted(range(len(scores)), key=lambda index: -costs[index][0])
    in_order = list(dict.fromkeys([0, *cumulative_in(scores), *by_cost]))
    shown = range(len(scores)) if len(scores) <= MOST_ROWS else in_order[:MOST_ROWS]
    for index in shown:
        one = scores.configurations[index]
        lost, low, high = costs[index]
        rows.append(
            {
                "name": one.configuration.name,
                "values": [_number(one[metric]) for metric in _SHOWN],
                "lost": _number(lost) if index else "",
                "interval": f"{_number(low)} to {_number(high)}" if index and not np.isnan(low) else "",
                "worse": low > 0,
            }
        )
    note = "AP lost is that with nothing off, less this one. "
    if len(scores) > MOST_ROWS:
        note += f"Of {counted(len(scores), 'configuration')} these are the cumulative sweep, if there is one, and then "
        note += "those that cost most; all are in configurations.csv. "
    return template("evaluation.html").render(
        title=_title(folder, provenance),
        verdict=evaluation_headline(scores),
        notes=[
            f"{counted(len(scores.images), 'image')}, {counted(len(scores), 'configuration')}"
            + (f"; {counted(len(skipped), 'image')} left out, see below" if skipped else "")
            + ".",
            *(one.describe() for one in orders),
        ],
        charts=charts,
        metrics=_SHOWN,
        lost="AP lost",
        rows=rows,
        table_note=note,
        worst=[
            _cards(folder, source, scores, group, pictures, command, open_sweep)
            for group in groups
            if group.images
        ],
        skipped=skipped,
        provenance=provenance,
        resamples=scores.resamples,
        files=files,
    )


def _title(folder: Path, provenance: Mapping[str, str]) -> str:
    data = provenance.get("data set") or provenance.get("annotations") or folder.resolve().name
    model = provenance.get("model", "")
    return f"{model} on {data}" if model else data


def _cards(
    folder: Path,
    source: SourceOfDetections,
    scores: Scores,
    group: ImageLosses,
    pictures: Pictures | None,
    command: Callable[[int, int], str] | None,
    open_sweep: Callable[[int, int], Path] | None,
) -> dict[str, Any]:
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
