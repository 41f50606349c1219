"""Pictures of detections and sweeps, as matplotlib figures.

The plotting functions take and return matplotlib axes. Without axes they create a figure, which
`ax.figure.savefig(...)` writes. They do not use pyplot, so they need no display and work in any thread.

    captions.py   titles, file names, names of objects
    palette.py    colours of objects, styles of statuses
    placing.py    places of labels
    marks.py      the matplotlib artist for boxes and labels
    canvas.py     figures of an image's shape
    pictures.py   plot_detections
    survival.py   plot_survival: the chart that suits the kind of sweep, from one of the next four
    cumulative.py, bars.py, changes.py, subsets.py
    chart_axes.py    what these charts have in common
    outcome_table.py  plot_outcomes
    totals.py     plot_totals: many images together
    sheets.py     all figures of a sweep
    colouring.py  relevance to colours
    object_views.py  explained objects: texts and boxes
    tiles.py      the parts of grids of maps
    relevance.py  plot_map, plot_relevance_grid, plot_head_attention
    relevance_sheets.py  all figures of an explanation
    notebook.py   results as notebooks show them
"""

from headoff.figures.colouring import MapStyle
from headoff.figures.outcome_table import plot_outcomes
from headoff.figures.palette import OBJECT_COLOURS, object_colour
from headoff.figures.pictures import plot_detections
from headoff.figures.relevance import plot_head_attention, plot_map, plot_relevance_grid
from headoff.figures.relevance_sheets import relevance_figures
from headoff.figures.sheets import SweepFigure, sweep_figures
from headoff.figures.survival import plot_survival
from headoff.figures.totals import plot_totals

__all__ = [
    "OBJECT_COLOURS",
    "MapStyle",
    "SweepFigure",
    "object_colour",
    "plot_detections",
    "plot_head_attention",
    "plot_map",
    "plot_outcomes",
    "plot_relevance_grid",
    "plot_survival",
    "plot_totals",
    "relevance_figures",
    "sweep_figures",
]
