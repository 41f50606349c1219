"""Pictures of detections and sweeps, as matplotlib figures.

The plotting functions take and return matplotlib axes. They use no pyplot: without axes they make a figure
that belongs to nobody (`ax.figure.savefig(...)` writes it), needs no display and can be made in any thread.

    captions.py   words: titles, file names, numbered objects
    palette.py    object colours, looks of a status
    placing.py    where labels go
    marks.py      the matplotlib artist for boxes and labels
    canvas.py     figures of an image's shape
    pictures.py   plot_detections
    charts.py     plot_survival, plot_outcomes
    sheets.py     all figures of a sweep
    colouring.py  relevance to colours
    object_views.py  explained objects, in words and boxes
    tiles.py      what grids of maps consist of
    relevance.py  plot_map, plot_relevance_grid, plot_head_attention
    relevance_sheets.py  all figures of an explanation
"""

from headoff.figures.charts import plot_outcomes, plot_survival
from headoff.figures.colouring import MapStyle
from headoff.figures.palette import OBJECT_COLOURS, object_colour
from headoff.figures.pictures import plot_detections
from headoff.figures.relevance import plot_head_attention, plot_map, plot_relevance_grid
from headoff.figures.relevance_sheets import relevance_figures
from headoff.figures.sheets import SweepFigure, sweep_figures

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
    "relevance_figures",
    "sweep_figures",
]
