"""The results of a sweep as table rows and as JSON."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headoff.outcomes import ConfigurationOutcome, Status
from headoff.relevance.explanations import Explanation
from headoff.report.evidence import headline
from headoff.sweeps import SweepResult
from headoff.totals import Totals

SCHEMA_VERSION = 2
"""Version of sweep.json. It changes when a key is renamed or removed or gets another meaning, not when one is added."""

DETECTION_COLUMNS = (
    *("image", "configuration", "text", "query", "label", "class", "score"),
    *("left", "top", "right", "bottom", "object", "status"),
)
OBJECT_COLUMNS = (
    *("image", "configuration", "text", "object", "query", "label", "class"),
    *("status", "iou", "score", "query_score", "new_class"),
    *("draws", "mean_query_score", "share_found"),
)
RELEVANCE_COLUMNS = (
    *("image", "configuration", "text", "method", "target"),
    *("object", "query", "label", "class", "score", "value"),
    *("layer", "status", "mass", "share_in_box", "peak_x", "peak_y"),
    *("decoder_identity_rows", "encoder_identity_rows", "reference_differs"),
)
TOTAL_COLUMNS = (
    *("configuration", "text", "images", "objects"),
    *(status.value for status in Status),
    *("unmatched", "survival", "low", "high"),
)
HEAD_COLUMNS = (
    *("image", "site", "object", "class", "layer", "head"),
    *("ablation", "measure", "value", "score", "standard_error"),
)
HEAD_TOTAL_COLUMNS = (
    *("site", "images", "of", "layer", "head"),
    *("ablation", "measure", "value", "score", "low", "high"),
)
Row = dict[str, str | int]


def detection_rows(result: SweepResult, image: str = "") -> Iterator[Row]:
    """One row for each detection of each configuration; `object` is empty for an unmatched detection."""
    for configuration, detections, outcome in zip(
        result.configurations, result.detections, result.outcomes, strict=True
    ):
        assignments = object_assignments(outcome)
        for index, detection in enumerate(detections):
            number, status = assignments.get(index, ("", "unmatched"))
            sides = (f"{side:.2f}" for side in detection.box)
            yield {
                "image": image,
                "configuration": configuration.name,
                "text": configuration.text,
                "query": detection.query,
                "label": detection.label,
                "class": detection.class_name,
                "score": f"{detection.score:.6g}",
                **dict(zip(("left", "top", "right", "bottom"), sides, strict=True)),
                "object": number,
                "status": status,
            }


def object_rows(result: SweepResult, image: str = "") -> Iterator[Row]:
    """One row for each object under each configuration."""
    for row in result.rows():
        yield {"image": image, **cells(row)}


def relevance_rows(explanation: Explanation, image: str = "") -> Iterator[Row]:
    """One row for each map. Values that do not exist are empty, such as the peak of a map without evidence."""
    for row in explanation.rows():
        yield {"image": image, **cells(row)}


def total_rows(totals: Totals) -> Iterator[Row]:
    """One row for each configuration."""
    return map(cells, totals.rows())


def object_assignments(outcome: ConfigurationOutcome) -> dict[int, tuple[int, str]]:
    """For every detection that belongs to an object, by its index: the object, and its status or `duplicate`."""
    return {
        index: (found.object, "duplicate" if rank else found.status.value)
        for found in outcome.outcomes
        for rank, index in enumerate(found.detections)
    }


def csv_text(columns: Sequence[str], rows: Iterator[Row]) -> str:
    """CSV with a header (RFC 4180, but with line feeds as line ends)."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def sweep_json(
    result: SweepResult,
    provenance: Mapping[str, str],
    files: Sequence[str] = (),
    explanation: Explanation | None = None,
) -> str:
    """The sweep without logits, and the explanation without maps; `files` are the other files of the output folder."""
    contents: dict[str, Any] = {
        "schema": "headoff.sweep",
        "schema_version": SCHEMA_VERSION,
        "verdict": headline(result, explanation),
        "provenance": dict(provenance),
        "files": list(files),
        **result.as_dict(),
    }
    if explanation is not None:
        contents["relevance"] = explanation.as_dict()
    return json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def cells(row: Mapping[str, Any]) -> Row:
    """Values as CSV has them: six digits, and nothing where there is no value."""
    return {
        name: ("" if math.isnan(value) else f"{value:.6g}")
        if isinstance(value, float)
        else ""
        if value is None
        else int(value)
        if isinstance(value, bool)
        else value
        for name, value in row.items()
    }
