"""From many failures to a root cause: what is wrong, and where in the model that shows first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from headoff.attention import Attention
from headoff.errors import HeadoffError
from headoff.harness.contracts import DEFORMABLE
from headoff.harness.finding import Finding
from headoff.harness.plugin.patch import Patch
from headoff.harness.plugin.run import Run
from headoff.harness.settings import Settings

SIDE_EFFECTS = ("calls", "randomness", "in-place", "state", "dtype", "shape", "layout")
"""Properties that come before numbers: wrong numbers may follow from them, but not they from wrong numbers."""

UNSTEADY = ("calls", "randomness", "in-place", "state")
"""Side effects under which numbers depend on more than the inputs."""

NUMBERS = ("context", "dq", "dk", "dv", "dlocations", "dweights")
"""Properties of single calls that experiments are needed to explain."""


def diagnose_run(run: Run, settings: Settings) -> tuple[list[Finding], list[str]]:
    """The causes of a run's failures, the root cause first, and notes on what could not be found out."""
    attention = Patch.of(settings).attention
    found = [finding for finding in run.findings if finding.property != "time"]
    if cheats := [finding for finding in found if finding.property == "timing"]:
        # It computes something else when it is timed: experiments with calls that are not would explain nothing.
        return _first_of_each([*cheats, *found]), []
    notes: list[str] = []
    causes: list[Finding] = []
    try:
        causes = causes_of(attention, found, settings)
    except (Exception, SystemExit) as error:
        notes.append(f"what is wrong with single calls was not found out: {type(error).__name__}: {error}")
    try:
        # Single calls are compared in headoff's own DETR only.
        elsewhere = settings.of_contract is DEFORMABLE or settings.model_choice.is_of_family()
        places = [] if elsewhere else places_in_model(attention, settings)
    except (Exception, SystemExit) as error:
        places = []
        notes.append(f"where in the model it is wrong was not found out: {_message(error)}")
    if not causes:
        # Single calls are right, as far as that was tested: what the model shows is all there is to say.
        causes = places or _first_of_each(found)
        places = []
    if causes:
        causes[0] = _placed(causes[0], places, found)
    return [*causes, *places], notes


def causes_of(attention: Attention, found: Sequence[Finding], settings: Settings) -> list[Finding]:
    """The causes that single calls show: side effects, then numbers, then exceptions.

    Where results depend on more than the inputs, wrong numbers are not explained by numbers.
    """
    side_effects = side_effects_of(found)
    numbers = None
    if not any(finding.property in UNSTEADY for finding in side_effects):
        numbers = explanation_of_numbers(attention, found, settings)
    # An exception is in some cases; what is wrong with all others says more.
    crash = _first_of_each(finding for finding in found if finding.property == "crash")
    return [*side_effects, *([numbers] if numbers else []), *crash]


def side_effects_of(found: Iterable[Finding]) -> list[Finding]:
    """The first side effect of each property; what others may follow from comes before them."""
    side_effects = _first_of_each(finding for finding in found if finding.property in SIDE_EFFECTS)
    return sorted(side_effects, key=lambda finding: SIDE_EFFECTS.index(finding.property))


def failing_cases(found: Iterable[Finding], settings: Settings) -> list[Any]:
    """The cases of single calls that gave wrong numbers."""
    texts = (finding.case for finding in found if finding.property in NUMBERS)
    cases = (_suite(settings).case_of_text(text, settings.seed) for text in texts)
    return [case for case in cases if case is not None]


def _suite(settings: Settings) -> Any:
    from headoff.harness import deformable, operator

    return deformable if settings.of_contract is DEFORMABLE else operator


def explanation_of_numbers(
    attention: Attention, found: Sequence[Finding], settings: Settings
) -> Finding | None:
    """Why single calls give wrong numbers; None where they do not."""
    import torch

    from headoff.harness.torch_settings import watched_settings

    cases = failing_cases(found, settings)
    with watched_settings():  # the attention may be one that changes them
        torch.set_num_threads(1)  # the cases are so small that threads would only wait for each other
        return _suite(settings).diagnose(attention, cases, settings.device) if cases else None


def places_in_model(attention: Attention, settings: Settings) -> list[Finding]:
    """Where the attention is wrong when it is given one call of the model at a time, with the oracle's inputs."""
    import torch

    from headoff.harness.model.attention_calls import faulty_layers
    from headoff.harness.reference.cases import case_names, reference_case

    one = reference_case(settings, case_names(settings)[0])
    return faulty_layers(attention, one, one.cumulative, torch.device(settings.device), settings.torch_dtype)


def _placed(cause: Finding, places: Sequence[Finding], found: Iterable[Finding]) -> Finding:
    """`cause` with its first place in the model, and a picture of what comes of it there."""
    pictures = next((finding.pictures for finding in found if finding.pictures), ())
    if places:
        first = places[0]
        return replace(
            cause,
            site=first.site,
            layer=first.layer,
            head=first.head,
            configuration=first.configuration,
            pictures=cause.pictures or pictures,
        )
    return replace(cause, pictures=cause.pictures or pictures)


def _first_of_each(found: Iterable[Finding]) -> list[Finding]:
    """The first finding of each property."""
    first: dict[str, Finding] = {}
    for finding in found:
        first.setdefault(finding.property, finding)
    return list(first.values())


def _message(error: BaseException) -> str:
    return str(error) if isinstance(error, HeadoffError) else f"{type(error).__name__}: {error}"
