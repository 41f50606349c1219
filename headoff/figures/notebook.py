"""How results show themselves in a notebook: a short table and one picture, never more than a screen of either."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape

from matplotlib.axes import Axes

from headoff.figures.canvas import figure_of
from headoff.figures.head_card import score_of
from headoff.figures.importance import plot_importance, score_text
from headoff.figures.importance_sheets import most_important
from headoff.figures.relevance import plot_relevance_grid
from headoff.figures.survival import plot_survival
from headoff.importance.result import HeadImportance, Key
from headoff.outcomes import Status
from headoff.relevance.explanations import Explanation
from headoff.sweeps import SweepResult
from headoff.wording import counted

MOST_ROWS = 12
MOST_OBJECTS = 4
LONGEST_SIDE = 1000
"""Pixels of a picture's longest side."""


def sweep_png(result: SweepResult) -> bytes:
    """The survival chart."""
    return _png(plot_survival(result))


def sweep_html(result: SweepResult) -> str:
    """What became of the objects under the first configurations, and the survival chart."""
    title = (
        f"{counted(len(result), 'configuration')}, {counted(len(result.baseline), 'object')} with none off"
    )
    rows = [
        (configuration.name, *outcome.counts.values(), len(outcome.unmatched))
        for configuration, outcome in zip(result.configurations, result.outcomes, strict=True)
    ]
    head = ("configuration", *(status.value for status in Status), "unmatched")
    return _html(title, head, rows, sweep_png(result), "the survival chart")


def explanation_png(explanation: Explanation) -> bytes:
    """The last maps of the first objects under the first configuration."""
    shown = range(min(len(explanation.objects), MOST_OBJECTS))
    last = replace(
        explanation,
        layers=explanation.layers[-1:],
        maps=explanation.maps[:, :, -1:],
        decoder_identity_rows=explanation.decoder_identity_rows[:, :, -1:],
        reference_differs=explanation.reference_differs[:, :, -1:],
        heads=None,
    )
    return _png(plot_relevance_grid(last, 0, objects=shown))


def explanation_html(explanation: Explanation) -> str:
    """Mass and status after the last layer, and the maps there of the first objects under the first configuration."""
    objects = explanation.objects
    title = (
        f"{counted(len(explanation), 'configuration')}, {counted(len(objects), 'object')}, "
        f"relevance ({explanation.method}) after decoder layer {explanation.layers[-1]}"
    )
    masses, shares = explanation.masses[..., -1].tolist(), explanation.box_shares[..., -1].tolist()
    rows = [
        (
            configuration.name,
            f"#{o} {objects[o].class_name}",
            f"{masses[c][o]:.3g}",
            "" if shares[c][o] != shares[c][o] else f"{shares[c][o]:.0%}",
            explanation.statuses[c][o][-1].value,
        )
        for c, configuration in enumerate(explanation.configurations)
        for o in range(len(objects))
    ]
    head = ("configuration", "object", "mass", "in its box", "status")
    first = explanation.configurations[0].name
    more = len(objects) - MOST_OBJECTS
    caption = f"relevance maps, {first}" + (f"; {counted(more, 'object')} more" if more > 0 else "")
    return _html(title, head, rows, explanation_png(explanation), caption)


def importance_png(importance: HeadImportance) -> bytes:
    """The first scores as a matrix of layers x heads, by the mean over objects."""
    return _png(plot_importance(importance))


def importance_html(importance: HeadImportance) -> str:
    """The heads with the largest first scores, by every measure of that value, and the matrix of the first scores."""
    layers, heads = importance.shape
    value, kind = importance.values[0], importance.ablations[0]
    title = (
        f"{counted(layers * heads, 'head')} of {importance.site}, {counted(len(importance.objects), 'object')}: "
        f"{value}, {kind} ablation, mean over objects"
    )
    rows = []
    for layer, head in most_important(importance):
        scores = [score_of(importance, Key(kind, name, value), head, layer) for name in importance.measures]
        cells = ("" if score is None else score_text(score, 3) for score in scores)
        rows.append((f"H{head}" if layer is None else f"L{layer}H{head}", *cells))
    head_row = ("head", *importance.measures)
    return _html(title, head_row, rows, importance_png(importance), "layers x heads")


def _png(ax: Axes) -> bytes:
    figure, buffer = figure_of(ax), io.BytesIO()
    dpi = min(100.0, LONGEST_SIDE / max(figure.get_size_inches()))
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _html(title: str, head: Sequence[str], rows: Sequence[Sequence[object]], picture: bytes, alt: str) -> str:
    def line(cells: Iterable[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    more = len(rows) - MOST_ROWS
    source = base64.b64encode(picture).decode()
    return "\n".join(
        [
            f"<p>{escape(title)}</p>",
            f"<table><thead>{line(head, 'th')}</thead><tbody>",
            *(line(row, "td") for row in rows[:MOST_ROWS]),
            "</tbody></table>",
            *([f"<p>... and {counted(more, 'row')} more: to_dataframe()</p>"] if more > 0 else []),
            f'<img src="data:image/png;base64,{source}" alt="{escape(alt)}" title="{escape(alt)}">',
        ]
    )
