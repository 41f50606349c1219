"""Titles and file names of configurations, and the list of pictures of a sweep."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from headoff.detections import Detections
from headoff.gates import none_off
from headoff.outcomes import ConfigurationOutcome, Outcome, Status
from headoff.sweeps import SweepResult

NONE_OFF = none_off().name


@dataclass(frozen=True)
class View:
    """One picture of a sweep: a configuration, or the baseline if no configuration equals it."""

    title: str
    stem: str
    """Name of its file, without suffix."""
    text: str
    detections: Detections
    outcome: ConfigurationOutcome
    configuration: int | None
    """Index in the sweep; None for the baseline."""


def views(result: SweepResult) -> tuple[View, ...]:
    """The pictures of a sweep, in order. The baseline comes first, unless a configuration equals it."""
    digits = max(2, len(str(max(len(result) - 1, 0))))
    shown = [
        View(
            title=configuration.name,
            stem=f"{index:0{digits}}-{slug(configuration.name)}",
            text=configuration.text,
            detections=result.detections[index],
            outcome=result.outcomes[index],
            configuration=index,
        )
        for index, configuration in enumerate(result.configurations)
    ]
    if all(configuration.clauses for configuration in result.configurations):
        shown.insert(
            0, View(NONE_OFF, "baseline", "none", result.baseline, baseline_outcome(result.baseline), None)
        )
    return tuple(shown)


def baseline_outcome(baseline: Detections) -> ConfigurationOutcome:
    """The baseline against itself: every object kept."""
    return ConfigurationOutcome(
        outcomes=tuple(
            Outcome(index, found.query, found.label, Status.KEPT, (index,), 1.0, found.score, found.score)
            for index, found in enumerate(baseline)
        ),
        unmatched=(),
    )


def slug(name: str) -> str:
    """`name` as a part of a file name: at most 60 lower case ASCII letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60].rstrip("-") or "configuration"


def object_name(baseline: Detections, index: int) -> str:
    """`#2 star`: an object's number and class."""
    return f"#{index} {one_line(baseline[index].class_name)}"


def one_line(text: str) -> str:
    """`text` without line breaks and control characters, which a picture cannot show."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def shorten(text: str, length: int) -> str:
    """`text`, cut to `length` characters with an ellipsis at the end."""
    return text if len(text) <= length else text[: max(length - 1, 0)].rstrip() + "…"


def listed(words: Iterable[str]) -> str:
    """`a, b and c`."""
    *most, last = [*words] or [""]
    return f"{', '.join(most)} and {last}" if most else last
