"""The survival chart of a sweep; what it looks like depends on the kind of the sweep."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes

from headoff.figures.bars import MOST_BARS, bars_of, plot_bars
from headoff.figures.changes import MOST_SMALL_MATRICES, plot_changes, plot_head_changes
from headoff.figures.chart_axes import clean, empty, new_axes
from headoff.figures.cumulative import plot_cumulative
from headoff.figures.subsets import plot_subsets
from headoff.gates import CumulativeSweep, SingleHeadSweep, SubsetSweep, kind_of
from headoff.sweeps import SweepResult

FEW = 6
"""With at most so many configurations that have heads off, bars are easier to read than other charts."""

MOST_LINES = 16
"""With more objects, lines of a cumulative sweep cannot be told apart."""

NARROW_WIDTH = 4.3
"""Width in inches of charts for narrow screens."""
MOST_COLUMNS = 12
"""Most heads of a chart for narrow screens."""


@dataclass(frozen=True)
class SurvivalChart:
    """A chart, and what it shows in one or two sentences."""

    plot: Callable[[SweepResult, Axes | None], Axes]
    caption: str


_PROBABILITY = "the probability of the object's class at the query that found it"
_TAKEN_OVER = "An object may be kept below the dotted line: then another query has taken it over."
_CUMULATIVE = SurvivalChart(
    plot_cumulative, f"For each object, {_PROBABILITY}, over the number of heads off. {_TAKEN_OVER}"
)
_BARS = SurvivalChart(plot_bars, f"For each configuration and object, {_PROBABILITY}. {_TAKEN_OVER}")
_SINGLE = SurvivalChart(
    plot_head_changes,
    f"For each head that is off alone, the largest change of {_PROBABILITY}, and the number of that object.",
)
_SUBSETS = SurvivalChart(
    plot_subsets,
    "For each number of heads off, the fraction of objects that are still found, over all subsets of that many "
    "heads. The best subset finds most objects, the worst fewest; of equal ones, the mean probability decides.",
)
_OTHER = SurvivalChart(
    plot_changes, f"For each configuration and object, the change of {_PROBABILITY} from none off."
)


def survival_chart(result: SweepResult) -> SurvivalChart:
    """The chart that suits the sweep: of its kind, or bars if there are few configurations."""
    kind = kind_of(result.configurations)
    if isinstance(kind, CumulativeSweep) and len(result.baseline) <= MOST_LINES:
        return _CUMULATIVE
    few = sum(bool(configuration.clauses) for configuration in result.configurations) <= FEW
    if few and bars_of(result) <= MOST_BARS:
        return _BARS
    if isinstance(kind, SingleHeadSweep):
        return _SINGLE
    return _SUBSETS if isinstance(kind, SubsetSweep) else _OTHER


def narrow_height(result: SweepResult) -> float | None:
    """The height in inches of a chart that is `NARROW_WIDTH` inches wide; None if that would not be readable."""
    kind, chart, objects = kind_of(result.configurations), survival_chart(result), len(result.baseline)
    if not objects or not len(result):
        return NARROW_WIDTH
    if chart is _BARS:
        return 1.5 + 0.17 * bars_of(result) if bars_of(result) <= 60 else None
    if isinstance(kind, CumulativeSweep):
        return 4.0 if kind.heads <= MOST_COLUMNS and objects <= MOST_LINES else None
    if isinstance(kind, SingleHeadSweep):
        return 2.2 + 0.4 * len(kind.layers) if len(kind.heads) <= MOST_COLUMNS else None
    if isinstance(kind, SubsetSweep):
        return 4.6 if len(kind.heads) <= MOST_COLUMNS else None
    return None


def shows_objects_apart(result: SweepResult) -> bool:
    """Whether `headoff.figures.changes.head_changes_by_object` adds to the survival chart."""
    return survival_chart(result) is _SINGLE and 1 < len(result.baseline) <= MOST_SMALL_MATRICES


def plot_survival(result: SweepResult, ax: Axes | None = None) -> Axes:
    """What remains of the objects under the configurations of a sweep, each object at the query that found it.

    - Cumulative sweep of up to 16 objects: each object's probability as a line over the number of heads off.
    - Up to six configurations: each object's probability as a bar, for each configuration.
    - Every single head: the largest change of a probability as a matrix of layers x heads.
    - All subsets of heads: the fraction of objects found over the number of heads off.
    - Other configurations: the change of each object's probability as a matrix of objects x configurations.

    Returns:
        `ax`, or the axes of a new figure.
    """
    if len(result.baseline) and len(result):
        return survival_chart(result).plot(result, ax)
    ax = new_axes(7.2, 4.0) if ax is None else ax
    clean(ax)
    nothing = (
        "No object is detected with none off." if len(result) else "There is no configuration to compare."
    )
    return empty(ax, nothing)
