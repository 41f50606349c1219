"""The card of one head: its scores, the detections without it, and where it looks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headoff.choices import AblationKind
from headoff.figures.canvas import DPI, fitted
from headoff.figures.captions import NONE_OFF, baseline_outcome, object_name, shorten
from headoff.figures.chart_axes import LONGEST_NAME, clean, without_frame
from headoff.figures.colouring import MapStyle
from headoff.figures.importance import decimals_of, score_limit, score_text
from headoff.figures.palette import INK, MUTED
from headoff.figures.pictures import plot_detections, small_picture, summary
from headoff.figures.relevance import plot_map
from headoff.images import ImageSource
from headoff.importance.cards import HeadCards
from headoff.importance.result import HeadImportance, Key
from headoff.relevance.explanations import Explanation

MOST_MAPS = 6
"""Objects whose attention is in the figure."""
_WIDTH = 9.6
_LINE = 0.19
"""Height of a line of numbers in inches."""


def head_name(head: int, layer: int | None) -> str:
    """`layer 5, head 2`; `head 2 in all layers`."""
    return f"head {head} in all layers" if layer is None else f"layer {layer}, head {head}"


def head_attention(attention: Explanation, head: int, layer: int | None) -> Explanation:
    """The cross-attention of one head as the only maps of an explanation: in a layer, or the mean over layers."""
    assert attention.heads is not None
    maps = attention.heads[:, :, :, head]
    at = len(attention.layers) - 1 if layer is None else attention.layers.index(layer)
    chosen = maps.mean(2, keepdim=True) if layer is None else maps[:, :, at : at + 1]
    last = slice(at, at + 1)
    return replace(
        attention,
        layers=attention.layers[last],
        maps=chosen,
        decoder_identity_rows=attention.decoder_identity_rows[:, :, last],
        reference_differs=attention.reference_differs[:, :, last],
        heads=None,
    )


def head_card(
    image: ImageSource,
    importance: HeadImportance,
    cards: HeadCards,
    head: int,
    layer: int | None = None,
    *,
    ablation: AblationKind | None = None,
) -> Figure:
    """A figure of one head: detections with none off and without it, its scores, its attention over objects.

    Args:
        image: the image.
        importance: the scores.
        cards: `HeadCards.of` the same image.
        head: its number.
        layer: its layer; None for the head in all layers.
        ablation: what it contributes when it is off; by default the first kind.

    Raises:
        SettingError: there is no such head.
    """
    kind = ablation or importance.ablations[0]
    index, result = cards.index(head, layer), cards.sweeps[kind]
    picture = small_picture(image)
    attention = None if cards.attention is None else head_attention(cards.attention, head, layer)
    maps = 0 if attention is None else min(len(attention.objects), MOST_MAPS)
    numbers = _numbers(importance, head, layer, kind)
    shape = picture.height / picture.width
    # The two pictures are side by side, unless the image is flat.
    across = 1 if shape < 0.45 else 2
    pictures = (2 // across) * (
        min(fitted((picture.height, picture.width), 17)[1], _WIDTH / across * shape) + 0.5
    )
    tile = 0.0 if not maps else min(_WIDTH / max(maps, 3) * shape, 2.4) + 0.35
    table = _LINE * (len(numbers) + 2.2)
    figure = Figure(
        figsize=(_WIDTH, pictures + tile + table + 0.6), dpi=DPI, facecolor="white", layout="constrained"
    )
    heights = [pictures, *([tile] if maps else []), table]
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    axes = parts[0].subplots(2 // across, across, squeeze=False).ravel()
    plot_detections(
        picture, result.baseline, axes[0], title=NONE_OFF, outcome=baseline_outcome(result.baseline)
    )
    plot_detections(
        picture,
        result.detections[index],
        axes[1],
        outcome=result.outcomes[index],
        baseline=result.baseline,
        title=f"without it ({kind} ablation)",
    )
    axes[1].set_xlabel(summary(result.outcomes[index]), fontsize=8, color=MUTED, loc="left")
    if attention is not None:
        style = MapStyle(scale="map", overlay=True)
        for number, ax in enumerate(parts[1].subplots(1, max(maps, 3), squeeze=False).ravel()):
            if number >= maps:
                ax.axis("off")
                continue
            name = shorten(object_name(attention.objects, number), LONGEST_NAME)
            plot_map(attention, 0, number, ax=ax, image=picture, style=style, title="")
            title = ax.set_title(f"looks at, for {name}", loc="left", fontsize=8, pad=-4)
            title.set(parse_math=False, color=INK)
    _draw_numbers(parts[-1].subplots(), numbers)
    heading = f"{head_name(head, layer)} ({importance.site})"
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold")
    return figure


def _numbers(
    importance: HeadImportance, head: int, layer: int | None, kind: AblationKind
) -> list[tuple[str, ...]]:
    """A header, and for each measure of the head its mean scores by value."""
    rows: list[tuple[str, ...]] = [(f"mean over objects, {kind} ablation", *importance.values)]
    for measure in importance.measures:
        cells = []
        for value in importance.values:
            score = score_of(importance, Key(kind, measure, value), head, layer)
            limit = 1.0 if score is None else score_limit(importance.mean_scores(measure, value, kind))
            cells.append("–" if score is None else score_text(score, decimals_of(limit)))
        if set(cells) != {"–"}:
            rows.append((measure, *cells))
    return rows


def score_of(importance: HeadImportance, key: Key, head: int, layer: int | None) -> float | None:
    """The mean over objects of a head's score; None if the measure does not score that.

    A measure of heads in all layers has a score for the head of any layer, others none for a head in all layers.
    """
    if key not in importance.scores:
        return None
    mean = importance.mean_scores(key.measure, key.value, key.ablation)
    if len(mean) == 1:
        return float(mean[0, head])
    return None if layer is None else float(mean[layer, head])


def _draw_numbers(ax: Axes, rows: list[tuple[str, ...]]) -> None:
    clean(ax)
    without_frame(ax)
    ax.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(len(rows), -0.3))
    for line, row in enumerate(rows):
        for column, text in enumerate(row):
            x = 0 if column == 0 else 0.3 + 0.7 * column / (len(row) - 1)
            ax.text(
                x,
                line + 0.5,
                text,
                ha="left" if column == 0 else "right",
                va="center",
                fontsize=8,
                color=MUTED if line == 0 else INK,
                parse_math=False,
            )
