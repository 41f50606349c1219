"""`headoff.heads`: what each head contributes to each object of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from headoff.ablation import Ablation, References, ablation_draws
from headoff.choices import DEFAULT_SITE, AblationKind, Site
from headoff.detr.detector import Detector
from headoff.errors import SettingError
from headoff.gates.validation import check_site
from headoff.images import ImageSource, load_image
from headoff.importance.games import Game
from headoff.importance.measures import Measure, Scores, resolve_measure, score_all
from headoff.importance.result import HeadImportance, Key, Totals
from headoff.sweeps import MEMORY_BUDGET
from headoff.values import ValueSpec, resolve_value

DEFAULT_MEASURES = ("removal", "alone", "gradient", "shapley_columns")
DEFAULT_VALUES = ("probability", "logit", "iou", "found", "duplicates")


def heads(
    detector: Detector,
    image: ImageSource,
    *,
    site: Site = DEFAULT_SITE,
    measures: str | Measure | Sequence[str | Measure] = DEFAULT_MEASURES,
    values: ValueSpec | Sequence[ValueSpec] = DEFAULT_VALUES,
    ablations: AblationKind | Sequence[AblationKind] = ("zero", "uniform"),
    references: References | str | Path | None = None,
    confidence: float = 0.5,
    memory_budget: int = MEMORY_BUDGET,
    progress: Callable[[int, int], None] | None = None,
) -> HeadImportance:
    """Score what every head of a site contributes to every object of an image.

    Args:
        detector: see `headoff.load`.
        image: a path, a `PIL.Image` or an array.
        site: where the heads are.
        measures: names (see `headoff.importance.measures`) or measures: `removal`, `alone`, `gradient`,
            `integrated_gradient`, `shapley_columns`, `shapley_layers`, `shapley`.
        values: names (see `headoff.values`) or functions of (logits, boxes).
        ablations: what heads that are off contribute, see `headoff.ablation`. With `resample`, values are averaged over
            the sampled images.
        references: the reference set of `mean`, `resample` and `optimal`, or its file.
        confidence: score above which a query's prediction is an object.
        memory_budget: limit of decoder activations in bytes; it changes results by rounding at most.
        progress: called with (number of evaluated coalitions, number of coalitions), without those of gradients.

    Returns:
        A `HeadImportance`, whose scores have no rows if nothing is detected.

    Raises:
        ImageError: the image cannot be read.
        SettingError: an argument is invalid, or a measure supports none of the values.
        AttentionError: gradients are wanted of an attention without a backward pass.
        NonFiniteError: a value or a derivative is not finite.

    Example:
        >>> found = headoff.heads(headoff.load("scenes"), headoff.sample_image(0))
        >>> found.get("shapley_columns", "probability").scores  # (objects, 1, heads)
    """
    check_site(site)
    chosen = [resolve_measure(m) for m in ([measures] if isinstance(measures, str | Measure) else measures)]
    wanted = [resolve_value(v) for v in ([values] if isinstance(values, str) or callable(values) else values)]
    kinds = [ablations] if isinstance(ablations, str) else list(ablations)
    _check_names("measure", [measure.name for measure in chosen])
    _check_names("value", [value.name for value in wanted])
    _check_names("ablation kind", kinds)
    for measure in chosen:
        if not any(measure.supports(value) for value in wanted):
            raise SettingError(
                f"the measure {measure.name!r} needs a derivative, and none of the values "
                f"{', '.join(value.name for value in wanted)} has one at the baseline: add the value 'probability', or "
                "leave the measure out"
            )
    picture = load_image(image)
    draws = {kind: ablation_draws(kind, detector, references, picture) for kind in kinds}
    game = Game.of(detector, picture, site, wanted, confidence, memory_budget)
    if progress is not None:
        game.progress = _total_progress(progress, chosen, game, draws.values())
    scores: dict[Key, Scores] = {}
    totals: dict[tuple[AblationKind, str], Totals] = {}
    for kind in kinds:
        under = game.under(draws[kind])
        everything = torch.tensor([True, False])[:, None, None].expand(2, *game.shape)
        for value, found in zip(wanted, under(everything), strict=True):
            totals[kind, value.name] = Totals(found[0], found[1])
        for name, results in score_all(chosen, under).items():
            for value, result in zip(wanted, results, strict=True):
                if result is not None:
                    scores[Key(kind, name, value.name)] = result
    of_image = frozenset(value.name for value in wanted if value.of_image)
    return HeadImportance(game.objects.detections, site, game.shape, scores, totals, of_image)


def _check_names(what: str, names: Sequence[str]) -> None:
    if not names:
        raise SettingError(f"there is no {what} to score heads by: name at least one")
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"the {what} {name!r} is named {names.count(name)} times: name it once")


def _total_progress(
    progress: Callable[[int, int], None],
    measures: Sequence[Measure],
    game: Game,
    draws: Iterable[Sequence[Ablation]],
) -> Callable[[int], None]:
    each = torch.cat([measure.coalitions(*game.shape) for measure in measures]).flatten(1)
    total = (len(each.unique(dim=0)) + 2) * sum(map(len, draws))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return advance
