"""The numbers of a sweep as rows and as JSON."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headoff.outcomes import ConfigurationOutcome
from headoff.relevance.explanations import Explanation
from headoff.report.evidence import headline
from headoff.sweeps import SweepResult

SCHEMA_VERSION = 1
"""Of sweep.json. It changes when a key is renamed, removed or means something else, not when one is added."""

DETECTION_COLUMNS = (
    *("image", "configuration", "text", "query", "label", "class", "score"),
    *("left", "top", "right", "bottom", "object", "status"),
)
OBJECT_COLUMNS = (
    *("image", "configuration", "text", "object", "query", "label", "class"),
    *("status", "iou", "score", "query_score", "new_class"),
)
RELEVANCE_COLUMNS = (
    *("image", "configuration", "text", "method", "target"),
    *("object", "query", "label", "class", "score", "value"),
    *("layer", "status", "mass", "share_in_box", "peak_x", "peak_y"),
    *("decoder_identity_rows", "encoder_identity_rows", "reference_differs"),
)
Row = dict[str, str | int]


def detection_rows(result: SweepResult, image: str = "") -> Iterator[Row]:
    """One row for each detection of each configuration; `object` is empty where it belongs to none."""
    for configuration, detections, outcome in zip(
        result.configurations, result.detections, result.outcomes, strict=True
    ):
        belongs = belongings(outcome)
        for index, each in enumerate(detections):
            number, status = belongs.get(index, ("", "of nothing"))
            sides = (f"{side:.2f}" for side in each.box)
            yield {
                "image": image,
                "configuration": configuration.name,
                "text": configuration.text,
                "query": each.query,
                "label": each.label,
                "class": each.class_name,
                "score": f"{each.score:.6g}",
                **dict(zip(("left", "top", "right", "bottom"), sides, strict=True)),
                "object": number,
                "status": status,
            }


def object_rows(result: SweepResult, image: str = "") -> Iterator[Row]:
    """One row for each object under each configuration."""
    for configuration, outcome in zip(result.configurations, result.outcomes, strict=True):
        for each in outcome.outcomes:
            yield {
                "image": image,
                "configuration": configuration.name,
                "text": configuration.text,
                "object": each.object,
                "query": each.query,
                "label": each.label,
                "class": result.class_names[each.label],
                "status": each.status.value,
                "iou": f"{each.iou:.6g}",
                "score": f"{each.score:.6g}",
                "query_score": f"{each.query_score:.6g}",
                "new_class": "" if each.new_label is None else result.class_names[each.new_label],
            }


def relevance_rows(explanation: Explanation, image: str = "") -> Iterator[Row]:
    """One row for each map. What is not there is empty: a query that was not found, the peak of no evidence."""
    scores, values = explanation.scores.tolist(), explanation.values.tolist()
    masses, shares = explanation.masses.tolist(), explanation.box_shares.tolist()
    peaks = explanation.peaks.tolist()
    statuses = explanation.statuses
    for c, configuration in enumerate(explanation.configurations):
        for o in range(len(explanation.objects)):
            query, label = int(explanation.queries[c, o]), int(explanation.labels[c, o])
            for m, layer in enumerate(explanation.layers):
                yield {
                    "image": image,
                    "configuration": configuration.name,
                    "text": configuration.text,
                    "method": explanation.method,
                    "target": explanation.target[o],
                    "object": o,
                    "query": query if query >= 0 else "",
                    "label": label if query >= 0 else "",
                    "class": explanation.objects.class_names[label] if query >= 0 else "",
                    "score": _number(scores[c][o]),
                    "value": _number(values[c][o]),
                    "layer": layer,
                    "status": statuses[c][o][m].value,
                    "mass": _number(masses[c][o][m]),
                    "share_in_box": _number(shares[c][o][m]),
                    "peak_x": _number(peaks[c][o][m][0]),
                    "peak_y": _number(peaks[c][o][m][1]),
                    "decoder_identity_rows": int(explanation.decoder_identity_rows[c, o, m]),
                    "encoder_identity_rows": int(explanation.encoder_identity_rows[c, o]),
                    "reference_differs": int(explanation.reference_differs[c, o, m]),
                }


def belongings(outcome: ConfigurationOutcome) -> dict[int, tuple[int, str]]:
    """By index of a detection, its object and its part there: the object's status, or `duplicate`."""
    return {
        index: (each.object, "duplicate" if rank else each.status.value)
        for each in outcome.outcomes
        for rank, index in enumerate(each.detections)
    }


def csv_text(columns: Sequence[str], rows: Iterator[Row]) -> str:
    """CSV with a header, as RFC 4180 has it but for line ends, which are plain."""
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
    """The whole sweep but for its logits, and of an explanation all but its maps. `files` are the other files of the
    output folder."""
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


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
