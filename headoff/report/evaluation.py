"""The summary of a results folder of `headoff evaluate`: summary.json, tables, figures and a page."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headoff.evaluation.importance import head_scores
from headoff.evaluation.orders import ImportanceOrder
from headoff.evaluation.outcomes import COUNTED
from headoff.evaluation.relevance import SampleStatistics
from headoff.evaluation.scores import REFERENCES, Scores, SourceOfDetections
from headoff.figures.evaluation import cumulative_in, evaluation_figures
from headoff.report.drawing import Drawing
from headoff.report.evaluation_story import evaluation_headline, number_text
from headoff.report.evaluation_tables import configuration_rows, named, tables_of
from headoff.report.output import PAGE, SUMMARY, new_report
from headoff.report.page import inline_svg, template
from headoff.report.tables import cells, csv_text
from headoff.report.worst_images import ImageLosses, Pictures, cards_of, telling_configurations, worst_images
from headoff.wording import counted

SCHEMA_VERSION = 1
"""Version of summary.json. It changes when a key is renamed or removed or gets another meaning."""
CONTRIBUTIONS = "contributions.parquet"
MOST_ROWS = 60
"""Most configurations in the table of the page."""

_SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


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
    tables = tables_of(scores, ablation, relevance, faithfulness)
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
                **named(scores, group.configuration),
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
                "values": [number_text(one[metric]) for metric in _SHOWN],
                "lost": number_text(lost) if index else "",
                "interval": f"{number_text(low)} to {number_text(high)}"
                if index and not np.isnan(low)
                else "",
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
            cards_of(folder, source, scores, group, pictures, command, open_sweep)
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
