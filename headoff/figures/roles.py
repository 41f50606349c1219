"""What heads are for, as pictures: what their removal does, and where they look."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from headoff.errors import SettingError
from headoff.figures.canvas import DPI, figure_of
from headoff.figures.chart_axes import LABEL_POINTS, clean, draw_cells, legend_above, without_frame
from headoff.figures.importance import decimals_of, score_text
from headoff.figures.matrix import colour, colour_bar, draw_values, hue_handles
from headoff.figures.palette import INK, MUTED, ink_on
from headoff.importance.attention import STATISTICS
from headoff.importance.roles import ROLES, HeadRoles
from headoff.values import resolve_value

SHOWN = ("tokens", "inside", "outside", "extremity", "offset_x", "offset_y")
"""The statistics of attention in the figure; roles.csv has all."""

_PANEL, _ROW = 4.1, 0.36
"""Width of a panel, and height of a row of cells, in inches."""
_BLUES = ListedColormap(colormaps["Blues"](np.linspace(0.02, 0.8, 101)))


def role_figures(found: HeadRoles) -> Iterator[tuple[str, Figure]]:
    """All figures with the stems of their files; one at a time."""
    yield "effects", plot_effects(found)
    if found.attention:
        yield "attention", plot_attention(found)
    if found.agreement is not None:
        yield "agreement", plot_agreement(found)


def plot_effects(found: HeadRoles) -> Figure:
    """What the removal of each head does to the value of each role: layers x heads, and heads in all layers.

    Scores are positive where the value falls without the head. A frame marks roles that the data supports.
    """
    layers, heads = found.shape
    figure, axes = _panels(found, len(ROLES), layers + 1)
    for ax, role in zip(axes, ROLES, strict=True):
        values = np.concatenate([found.effects[role.value].mean, found.column_effects[role.value].mean[None]])
        limit = max(float(np.abs(values).max()), role.least)
        draw_values(ax, values, limit)
        decimals = decimals_of(limit)
        for row, column in np.ndindex(*values.shape):
            value = float(values[row, column])
            _write(ax, row, column, score_text(value, decimals), colour(value, limit))
            if role in found.roles(column, row if row < layers else None):
                frame = Rectangle(
                    (column - 0.46, row - 0.43), 0.92, 0.86, fill=False, ec=INK, lw=1.5, zorder=3
                )
                ax.add_artist(frame).set_in_layout(False)
        ax.axhline(layers - 0.5, color=INK, lw=0.8)
        _name(ax, found, [*map(str, range(layers)), "all"], f"{role.name}: {resolve_value(role.value).title}")
        colour_bar(ax, limit, f"what removal costs ({role.value})")
    framed = Patch(facecolor="none", edgecolor=INK, linewidth=1.5, label="role supported by the interval")
    title = (
        f"Removal of single heads of {found.site}, and of a head in all layers: mean over {found.images} images, "
        f"{found.objects} objects"
    )
    legend_above(
        figure,
        [*hue_handles("value rises without it", "value falls without it"), framed],
        entry=2.1,
        title=title,
    )
    return figure


def plot_attention(found: HeadRoles) -> Figure:
    """Where each head looks: layers x heads for some of the statistics."""
    layers, _ = found.shape
    figure, axes = _panels(found, len(SHOWN), layers)
    for ax, name in zip(axes, SHOWN, strict=True):
        values = found.attention[name].mean
        signed = name.startswith("offset")
        if signed:
            limit = float(np.abs(values).max()) or 1.0
            draw_values(ax, values, limit)
            colour_bar(ax, limit, "half sides of the box")
        else:
            limit = float(values.max()) or 1.0
            scale = Normalize(0, limit)
            cells = [(c, r, _shade(scale, float(values[r, c]))) for r, c in np.ndindex(*values.shape)]
            draw_cells(ax, cells)
            without_frame(ax)
            ax.set_xlim(-0.55, values.shape[1] - 0.45)
            ax.set_ylim(layers - 0.45, -0.55)
            _bar(ax, scale, _BLUES)
        for row, column in np.ndindex(*values.shape):
            value = float(values[row, column])
            text = f"{value:+.2f}" if signed else f"{value:.0f}" if limit >= 20 else f"{value:.2f}"
            back = colour(value, limit) if signed else _shade(scale, value)
            _write(ax, row, column, text.replace("-", "−"), back)
        _name(ax, found, [*map(str, range(layers))], _sentence(STATISTICS[name]))
    figure.suptitle(
        f"Where heads of {found.site} look with everything on: mean over {found.images} images, "
        f"{found.objects} objects",
        color=INK,
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def plot_agreement(found: HeadRoles) -> Figure:
    """The cosine similarity of the maps of two heads, for every layer; and of a head's maps of two objects, and in two
    layers.

    Raises:
        SettingError: the maps were not measured, as at other sites than `decoder_cross`.
    """
    if found.agreement is None or found.across_objects is None or found.across_layers is None:
        raise SettingError(f"the maps of heads were not measured at {found.site}: measure decoder_cross")
    layers, heads = found.shape
    figure, axes = _panels(found, layers + 2, max(heads, layers))
    scale = Normalize(0, 1)
    alike = [found.agreement.mean[layer] for layer in range(layers)]
    titles = [f"Layer {layer}: two heads, the same object" for layer in range(layers)]
    panels = [*alike, found.across_objects.mean, found.across_layers.mean]
    titles += ["The same head, two objects", "The same head, this layer and the next"]
    for number, (ax, values, title) in enumerate(zip(axes, panels, titles, strict=True)):
        cells = [(c, r, _shade(scale, float(values[r, c]))) for r, c in np.ndindex(*values.shape)]
        draw_cells(ax, cells)
        without_frame(ax)
        ax.set_xlim(-0.55, heads - 0.45)
        ax.set_ylim(len(values) - 0.45, -0.55)
        for row, column in np.ndindex(*values.shape):
            value = float(values[row, column])
            _write(ax, row, column, f"{value:.2f}" if np.isfinite(value) else "", _shade(scale, value))
        _name(ax, found, [*map(str, range(len(values)))], title)
        if number < layers:
            ax.set_ylabel("head")
        _bar(ax, scale, _BLUES)
    figure.suptitle(
        f"Cosine similarity of attention maps: mean over {found.images} images, {found.objects} objects",
        color=INK,
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def _panels(found: HeadRoles, count: int, rows: int) -> tuple[Figure, list[Axes]]:
    across = min(count, 3 if found.shape[1] <= 8 else 1)
    down = -(-count // across)
    width = _PANEL * max(1.0, found.shape[1] / 8)
    figure = Figure(
        figsize=(across * width, 0.6 + down * (0.95 + _ROW * rows)),
        dpi=DPI,
        facecolor="white",
        layout="constrained",
    )
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for ax in axes[count:]:
        ax.set_visible(False)
    for ax in axes[:count]:
        clean(ax)
    return figure, axes[:count]


def _name(ax: Axes, found: HeadRoles, rows: list[str], title: str) -> None:
    ax.set_xticks(range(found.shape[1]))
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    ax.set_title(title, loc="left", fontsize=8.5, color=INK)


def _write(ax: Axes, row: int, column: int, text: str, back: str) -> None:
    written = ax.text(
        column, row, text, ha="center", va="center", fontsize=LABEL_POINTS - 1.5, color=ink_on(back), zorder=4
    )
    written.set_in_layout(False)


def _shade(scale: Normalize, value: float) -> str:
    return to_hex(_BLUES(scale(float(value)))) if np.isfinite(value) else "#ffffff"


def _bar(ax: Axes, scale: Normalize, colours: Colormap) -> None:
    bar = figure_of(ax).colorbar(ScalarMappable(scale, colours), ax=ax, aspect=14, pad=0.02, fraction=0.05)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=7)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
