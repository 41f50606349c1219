"""From many failures to their root: which property is wrong, and where in the model that shows first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from headoff.attention import Attention
from headoff.errors import HeadoffError
from headoff.harness.finding import Finding
from headoff.harness.plugin.patch import Patch
from headoff.harness.plugin.run import Run
from headoff.harness.settings import Settings

CONDUCT = ("calls", "randomness", "state", "in-place", "dtype", "shape", "layout")
"""Properties that are a root by themselves. Wrong numbers may follow from them, but not they from wrong numbers."""

NUMBERS = ("context", "dq", "dk", "dv")
"""Properties of single calls that an experiment is needed to explain."""


def roots_of(run: Run, settings: Settings) -> tuple[list[Finding], list[str]]:
    """The causes of a run's failures, the one that explains most first, and notes on what could not be found out."""
    attention = Patch.of(settings).attention
    found = [each for each in run.findings if each.property != "time"]
    notes: list[str] = []
    conduct = _one_each(each for each in found if each.property in CONDUCT)
    crash = _one_each(each for each in found if each.property == "crash")
    try:
        numbers = numbers_root(attention, found, settings)
    except Exception as error:
        numbers = None
        notes.append(f"what is wrong with single calls was not found out: {type(error).__name__}: {error}")
    try:
        places = places_in_model(attention, settings)
    except Exception as error:
        places = []
        notes.append(f"where in the model it is wrong was not found out: {_said(error)}")
    # An exception is in some cases; what is wrong with all others says more. And a call that is wrong by itself is
    # wrong after others as well.
    state = [each for each in conduct if each.property == "state"]
    rest = [each for each in conduct if each.property != "state"]
    roots = [*rest, *([numbers] if numbers else []), *state, *crash]
    if not roots:
        # Single calls are right, as far as that was tested: what the model shows is all there is to say.
        roots = places or _one_each(found)
        places = []
    if roots:
        roots[0] = _placed(roots[0], places, found)
    return [*roots, *places], notes


def numbers_root(attention: Attention, found: Sequence[Finding], settings: Settings) -> Finding | None:
    """Why single calls give wrong numbers; None where they do not."""
    from headoff.harness.operator import case_of_text, diagnose
    from headoff.harness.torch_settings import watched_settings

    cases = [case_of_text(each.case, settings.seed) for each in found if each.property in NUMBERS]
    known = [case for case in cases if case is not None]
    with watched_settings():  # the attention may be one that changes them
        return diagnose(attention, known, settings.device) if known else None


def places_in_model(attention: Attention, settings: Settings) -> list[Finding]:
    """Where the attention is wrong when each call of the model is given to it alone, with the oracle's inputs."""
    import torch

    from headoff.harness.model.attention_calls import faulty_layers
    from headoff.harness.reference.cases import case_names, reference_case

    one = reference_case(settings, case_names(settings)[0])
    return faulty_layers(attention, one, one.cumulative, torch.device(settings.device), settings.torch_dtype)


def _placed(root: Finding, places: Sequence[Finding], found: Iterable[Finding]) -> Finding:
    """`root` with its first place in the model, and a picture of what comes of it there."""
    pictures = next((each.pictures for each in found if each.pictures), ())
    if places:
        first = places[0]
        return replace(
            root,
            site=first.site,
            layer=first.layer,
            head=first.head,
            configuration=first.configuration,
            pictures=root.pictures or pictures,
        )
    return replace(root, pictures=root.pictures or pictures)


def _one_each(found: Iterable[Finding]) -> list[Finding]:
    """The first finding of each property."""
    first: dict[str, Finding] = {}
    for each in found:
        first.setdefault(each.property, each)
    return list(first.values())


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, HeadoffError) else f"{type(error).__name__}: {error}"
