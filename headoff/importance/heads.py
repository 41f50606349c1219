"""`headoff.heads`: what each head contributes to each object of an image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from headoff.ablation import References, ablation_draws, load_references
from headoff.ablation.references import fingerprint_of, hash_of_image
from headoff.attention import attention_label
from headoff.choices import DEFAULT_SITE, AblationKind, Site
from headoff.detector import Detector
from headoff.encoded import EncodedImage
from headoff.errors import SettingError
from headoff.gates import check_site_exists
from headoff.gates.validation import check_site
from headoff.images import ImageSource, load_image
from headoff.importance.games import Game
from headoff.importance.measures import (
    Coalitions,
    Measure,
    Scores,
    check_supported,
    resolve_measure,
    scores_of,
)
from headoff.importance.result import HeadImportance, Key, Totals
from headoff.importance.store import ValueStore
from headoff.sweeps import MEMORY_BUDGET
from headoff.values import ValueSpec, resolve_value

DEFAULT_MEASURES = ("removal", "alone", "gradient", "shapley_columns")
DEFAULT_VALUES = ("probability", "logit", "iou", "found", "duplicates")


def heads(
    detector: Detector,
    image: ImageSource | EncodedImage,
    *,
    site: Site = DEFAULT_SITE,
    measures: str | Measure | Sequence[str | Measure] = DEFAULT_MEASURES,
    values: ValueSpec | Sequence[ValueSpec] = DEFAULT_VALUES,
    ablations: AblationKind | Sequence[AblationKind] = ("zero", "uniform"),
    references: References | str | Path | None = None,
    confidence: float = 0.5,
    memory_budget: int = MEMORY_BUDGET,
    store: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeadImportance:
    """Score what every head of a site contributes to every object of an image.

    Args:
        detector: see `headoff.load`.
        image: a path, a `PIL.Image` or an array, or an `EncodedImage`.
        site: where the heads are.
        measures: names (see `headoff.importance.measures`) or measures: `removal`, `alone`, `gradient`,
            `integrated_gradient`, `shapley_columns`, `shapley_layers`, `shapley`.
        values: names (see `headoff.values`) or functions of (logits, boxes).
        ablations: what heads that are off contribute, see `headoff.ablation`. With `resample`, values are averaged over
            the sampled images.
        references: the reference set of `mean`, `resample` and `optimal`, or its file.
        confidence: score above which a query's prediction is an object.
        memory_budget: limit of decoder activations in bytes; it changes results by rounding at most.
        store: a folder where values of coalitions are kept, so that an interrupted call goes on where it stopped. It
            is not used if a value is a function.
        progress: called with (number of evaluated coalitions, number of coalitions), without those of gradients.

    Returns:
        A `HeadImportance`, whose scores have no rows if nothing is detected.

    Raises:
        ImageError: the image cannot be read.
        SettingError: an argument is invalid, or a measure supports none of the values.
        GateError: there is no such site, or the detector has no attention there.
        AttentionError: gradients are wanted of an attention without a backward pass.
        NonFiniteError: a value or a derivative is not finite.
        OutputError: the store cannot be written.

    Example:
        >>> found = headoff.heads(headoff.load("scenes"), headoff.sample_image(0))
        >>> found.get("shapley_columns", "probability").scores  # (objects, 1, heads)
    """
    check_site(site)
    check_site_exists(detector.head_layout, site, "site")
    chosen = [resolve_measure(m) for m in ([measures] if isinstance(measures, str | Measure) else measures)]
    specs = [values] if isinstance(values, str) or callable(values) else list(values)
    wanted = [resolve_value(spec) for spec in specs]
    kinds = [ablations] if isinstance(ablations, str) else list(ablations)
    _check_names("measure", [measure.name for measure in chosen])
    _check_names("value", [value.name for value in wanted])
    _check_names("ablation kind", kinds)
    check_supported(chosen, wanted)
    picture = image.picture if isinstance(image, EncodedImage) else load_image(image)
    draws = {kind: ablation_draws(kind, detector, references, picture) for kind in kinds}
    encoded = image if isinstance(image, EncodedImage) else EncodedImage.of(detector, picture)
    game = Game.of(detector, encoded, site, wanted, confidence, memory_budget)
    coalitions = Coalitions.of(chosen, game.shape)
    if progress is not None:
        game.progress = _total_progress(progress, len(coalitions.distinct) * len(kinds))
    scores: dict[Key, Scores] = {}
    totals: dict[tuple[AblationKind, str], Totals] = {}
    for kind in kinds:
        kept = None
        if store is not None and not any(map(callable, specs)):
            kept = _value_store(Path(store), game, kind, references, picture)
        under = game.under(draws[kind], kept)
        try:
            evaluated = under(coalitions.distinct)
        finally:
            if kept is not None:
                kept.write()
        for value, found in zip(wanted, evaluated, strict=True):
            totals[kind, value.name] = Totals(on=found[-1], off=found[0])
        tables = scores_of(chosen, under, coalitions, evaluated)
        for name, results in tables.items():
            for value, result in zip(wanted, results, strict=True):
                if result is not None:
                    scores[Key(kind, name, value.name)] = result
    of_image = frozenset(value.name for value in wanted if value.of_image)
    return HeadImportance(game.objects.detections, site, game.shape, scores, totals, of_image)


def _value_store(
    folder: Path, game: Game, kind: str, references: References | str | Path | None, picture: Image.Image
) -> ValueStore:
    detector = game.detector
    about = {
        "weights": fingerprint_of(detector),
        "attention": attention_label(detector.attention),
        "dtype": f"{detector.dtype}, {detector.autocast_dtype}",
        "preprocessing": repr(detector.preprocessing),
        "image": hash_of_image(picture),
        "site": game.site,
        "confidence": repr(game.objects.confidence),
        "values": ", ".join(value.name for value in game.values),
        "ablation": kind,
        "references": "" if kind in ("zero", "uniform") else _hash_of(references),
    }
    return ValueStore(folder / f"{kind}.safetensors", about)


def _hash_of(references: References | str | Path | None) -> str:
    if references is None:
        return "bundled"
    if not isinstance(references, References):
        references = load_references(references)
    total = hashlib.sha256()
    for name in ("mean", "samples", "optimal"):
        for site, tensor in sorted(getattr(references, name).items()):
            total.update(f"{name} {site}".encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def _check_names(what: str, names: Sequence[str]) -> None:
    if not names:
        raise SettingError(f"there is no {what} to score heads by: name at least one")
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"the {what} {name!r} is named {names.count(name)} times: name it once")


def _total_progress(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return advance
