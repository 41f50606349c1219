"""What heads contribute, in sentences."""

from headoff.figures.captions import shorten
from headoff.figures.importance import decimals_of, score_text
from headoff.importance.aggregate import ImportanceTotals
from headoff.importance.result import HeadImportance, Key
from headoff.wording import counted

_WORDS = {"probability": "class probability", "logit": "class logit", "iou": "IoU"}


def heads_headline(importance: HeadImportance) -> str:
    """Which head adds most to the objects, in all layers and alone."""
    objects = len(importance.objects)
    value, kind = importance.values[0], importance.ablations[0]
    if not objects and value not in importance.image_values:
        return "Nothing is detected, so there is nothing that heads contribute to."
    means = {
        name: importance.mean_scores(name, value, kind).tolist()
        for name in importance.measures
        if Key(kind, name, value) in importance.scores
    }
    where = "the image" if value in importance.image_values else counted(objects, "object")
    return _headline(means, importance.shape[0], value, where)


def totals_headline(totals: ImportanceTotals) -> str:
    """Which head adds most over all images."""
    if not totals.scores:
        return f"Nothing is detected in {counted(totals.images, 'image')}."
    first = next(iter(totals.scores))
    means = {
        key.measure: found.scores.tolist()
        for key, found in totals.scores.items()
        if (key.value, key.ablation) == (first.value, first.ablation)
    }
    where = f"{counted(totals.objects, 'object')} in {counted(totals.images, 'image')}"
    return _headline(means, totals.shape[0], first.value, where)


def _headline(means: dict[str, list[list[float]]], layers: int, value: str, where: str) -> str:
    quantity = _WORDS.get(value, shorten(value, 30))
    parts = []
    columns = next((rows[0] for rows in means.values() if len(rows) == 1 < layers), None)
    if columns is not None:
        head = max(range(len(columns)), key=lambda index: abs(columns[index]))
        parts.append(
            f"Head {head} contributes most to {where}: {_signed(columns[head])} of {quantity} over all layers"
        )
    name, single = next(((n, r) for n, r in means.items() if len(r) > 1 or layers == 1), (None, None))
    if single is not None and name == "removal":
        layer, head = max(
            ((layer, head) for layer in range(len(single)) for head in range(len(single[0]))),
            key=lambda place: abs(single[place[0]][place[1]]),
        )
        score = single[layer][head]
        does = f"costs most: {_signed(-score)}" if score > 0 else f"changes most: {_signed(-score)}"
        parts.append(
            f"Off alone, L{layer}H{head} {does}"
            if parts
            else f"Of single heads switched off, L{layer}H{head} {does} of {quantity}, mean over {where}"
        )
    if not parts:
        name, rows = next(iter(means.items()))
        layer, head = max(
            ((layer, head) for layer in range(len(rows)) for head in range(len(rows[0]))),
            key=lambda place: abs(rows[place[0]][place[1]]),
        )
        place = f"head {head}" if len(rows) == 1 else f"L{layer}H{head}"
        parts.append(
            f"By {name} {place} contributes most to {where}: {_signed(rows[layer][head])} of {quantity}"
        )
    return ". ".join(parts) + "."


def _signed(value: float) -> str:
    return score_text(value, decimals_of(abs(value))) if abs(value) >= 5e-4 else "less than 0.001"
