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
    removal_curves.py  plot_curves: an order of heads by importance compared with others
    chart_axes.py    what these charts have in common
    outcome_table.py  plot_outcomes
    totals.py     plot_totals: many images together
    sheets.py     all figures of a sweep
    colouring.py  relevance to colours
    object_views.py  explained objects: texts and boxes
    tiles.py      the parts of grids of maps
    relevance.py  plot_map, plot_relevance_grid, plot_head_attention
    sampling_points.py  plot_sampling_points: where deformable attention looks
    relevance_sheets.py  all figures of an explanation
    matrix.py     matrices of signed numbers
    importance.py  what heads contribute: plot_importance, importance_by_object, plot_columns, plot_interactions
    importance_comparisons.py  compare_measures, plot_ablations
    head_card.py  head_card: the card of one head
    importance_sheets.py  all figures of what heads contribute
    faithfulness.py  plot_faithfulness, plot_faithfulness_curves, plot_methods: relevance methods compared
    evaluation.py  data sets: plot_precision, plot_class_losses, plot_outcome_rates
    evaluation_heads.py  plot_heads_precision
    evaluation_samples.py  relevance and its faithfulness in samples of data sets
    evaluation_comparison.py  two results on the same images: plot_comparison, plot_differences
    notebook.py   results as notebooks show them
"""

from headoff.figures.colouring import MapStyle
from headoff.figures.evaluation import (
    plot_class_losses,
    plot_outcome_rates,
    plot_precision,
    plot_subset_precision,
)
from headoff.figures.evaluation_comparison import plot_comparison, plot_differences
from headoff.figures.evaluation_heads import plot_heads_precision
from headoff.figures.faithfulness import plot_faithfulness, plot_faithfulness_curves, plot_methods
from headoff.figures.head_card import head_card
from headoff.figures.importance import (
    importance_by_object,
    plot_columns,
    plot_importance,
    plot_interactions,
)
from headoff.figures.importance_comparisons import compare_measures, plot_ablations
from headoff.figures.importance_sheets import importance_figures
from headoff.figures.outcome_table import plot_outcomes
from headoff.figures.palette import OBJECT_COLOURS, object_colour
from headoff.figures.pictures import plot_detections
from headoff.figures.relevance import plot_head_attention, plot_map, plot_relevance_grid
from headoff.figures.relevance_sheets import relevance_figures
from headoff.figures.removal_curves import plot_curves
from headoff.figures.sampling_points import plot_sampling_points
from headoff.figures.sheets import SweepFigure, sweep_figures
from headoff.figures.survival import plot_survival
from headoff.figures.totals import plot_totals

__all__ = [
    "plot_differences",
    "plot_comparison",
    "plot_subset_precision",
    "plot_precision",
    "plot_outcome_rates",
    "plot_heads_precision",
    "plot_class_losses",
    "MapStyle",
    "OBJECT_COLOURS",
    "SweepFigure",
    "compare_measures",
    "head_card",
    "importance_by_object",
    "importance_figures",
    "object_colour",
    "plot_ablations",
    "plot_columns",
    "plot_curves",
    "plot_detections",
    "plot_faithfulness",
    "plot_faithfulness_curves",
    "plot_head_attention",
    "plot_importance",
    "plot_interactions",
    "plot_map",
    "plot_methods",
    "plot_outcomes",
    "plot_relevance_grid",
    "plot_sampling_points",
    "plot_survival",
    "plot_totals",
    "relevance_figures",
    "sweep_figures",
]
