"""The comparison of two results folders: comparison.json, tables and a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from headoff.evaluation.comparison import Comparison, signed, table_head
from headoff.evaluation.outcomes import COUNTED
from headoff.figures.evaluation_comparison import plot_comparison, plot_differences
from headoff.report.output import COMPARISON, PAGE, new_report
from headoff.report.page import inline_svg, template
from headoff.report.tables import cells, csv_text
from headoff.wording import counted

SCHEMA_VERSION = 1
"""Version of comparison.json. It changes when a key is renamed or removed or gets another meaning."""
COLUMNS = ("configuration", "text", "images", "metric", "a", "b", "difference", "low", "high")
CLASS_COLUMNS = ("configuration", "text", "class", "a", "b", "difference", "low", "high")
OUTCOME_COLUMNS = ("configuration", "text", "outcome", "a", "b")


def comparison_headline(comparison: Comparison) -> str:
    """The verdict, in one or two sentences."""
    found, low, high = comparison.difference(0)
    text = f"With nothing off, B's AP is {_words(found, low, high)}."
    if len(comparison) > 1:
        differences = [comparison.difference(index) for index in range(len(comparison))]
        index = int(np.argmin([one[0] for one in differences]))
        name = comparison.a.configurations[index].configuration.name
        if index and differences[index][0] < 0:
            text += f" It is lowest against A's with {name}: {_words(*differences[index])}."
    return text


def _words(found: float, low: float, high: float) -> str:
    span = "" if np.isnan(low) else f" ({signed(low)} to {signed(high)})"
    if found == low == high == 0:
        return "that of A"
    return f"{'higher' if found > 0 else 'lower'} by {abs(found):.4f}{span}" if found else f"that of A{span}"


def notes_on(comparison: Comparison) -> list[str]:
    """What is to be known of the comparison, a sentence each."""
    notes = [
        f"{counted(len(comparison.image_ids), 'image')} and {counted(len(comparison), 'configuration')} in both."
    ]
    for letter, only in zip("AB", (comparison.only_a, comparison.only_b), strict=True):
        if only:
            notes.append(
                f"Only {letter} has {counted(len(only), 'other configuration')}, which are left out."
            )
    return notes


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write the comparison into `folder`, and return the path of its page. Raises OutputError."""
    with new_report(folder) as write:
        write("comparison.csv", csv_text(COLUMNS, map(cells, comparison.rows())))
        write("classes.csv", csv_text(CLASS_COLUMNS, map(cells, comparison.class_rows())))
        write("outcomes.csv", csv_text(OUTCOME_COLUMNS, map(cells, comparison.outcome_rows())))
        write("comparison.md", comparison.table() + "\n")
        write(PAGE, _page(comparison, (*write.files, COMPARISON)))
        write(COMPARISON, comparison_json(comparison, write.files))
    return folder / PAGE


def comparison_json(comparison: Comparison, files: list[str]) -> str:
    """The contents of comparison.json."""

    def number(value: float) -> float | None:
        return None if np.isnan(value) else value

    configurations = []
    for index, one in enumerate(comparison.a.configurations):
        other = comparison.b.configurations[index]
        found, low, high = comparison.difference(index)
        configurations.append(
            {
                "configuration": one.configuration.name,
                "text": one.configuration.text,
                "a": number(one["AP"]),
                "b": number(other["AP"]),
                "difference": number(found),
                "low": number(low),
                "high": number(high),
                "outcomes": {
                    name: dict(zip(COUNTED, map(number, map(float, rates)), strict=True))
                    for name, rates in (
                        ("a", one.outcomes["truth"].rates),
                        ("b", other.outcomes["truth"].rates),
                    )
                },
            }
        )
    contents = {
        "schema": "headoff.comparison",
        "schema_version": SCHEMA_VERSION,
        "verdict": comparison_headline(comparison),
        "files": list(files),
        "a": comparison.names[0],
        "b": comparison.names[1],
        "images": len(comparison.image_ids),
        "resamples": comparison.a.resamples,
        "confidence": comparison.a.confidence,
        "only_a": list(comparison.only_a),
        "only_b": list(comparison.only_b),
        "configurations": configurations,
    }
    return json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _page(comparison: Comparison, files: tuple[str, ...]) -> str:
    rows = [
        {"cells": row, "worse": comparison.difference(index)[2] < 0}
        for index, row in enumerate(comparison.table_rows())
    ]
    charts = [
        {"caption": "AP of both.", "svg": inline_svg(plot_comparison(comparison), "chart-ap")},
        {
            "caption": "AP of B less AP of A.",
            "svg": inline_svg(plot_differences(comparison), "chart-difference"),
        },
    ]
    return template("comparison.html").render(
        names=comparison.names,
        verdict=comparison_headline(comparison),
        notes=notes_on(comparison),
        charts=charts,
        head=table_head(),
        rows=rows,
        classes=_classes(comparison),
        files=files,
    )


def _classes(comparison: Comparison) -> list[dict[str, Any]]:
    """AP of classes with nothing off, the one that B loses most in first."""
    found, low, high = comparison.class_differences(0)
    first, second = comparison.a.baseline.by_class, comparison.b.baseline.by_class
    return [
        {
            "name": comparison.a.truth.class_names[label],
            "a": f"{first[label]:.4f}",
            "b": f"{second[label]:.4f}",
            "difference": signed(found[label]),
            "interval": "" if np.isnan(low[label]) else f"{signed(low[label])} to {signed(high[label])}",
            "worse": high[label] < 0,
        }
        for label in np.argsort(found, kind="stable")
        if not np.isnan(found[label])
    ]
