import colorsys
from itertools import combinations

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sweep_examples import crowd, example, photo, scene_example

from headoff.figures import object_colour, plot_detections, plot_outcomes, plot_survival, sweep_figures
from headoff.figures.captions import slug, views
from headoff.figures.changes import changes, head_changes, head_changes_by_object
from headoff.figures.cumulative import spread
from headoff.figures.marks import MOST_LABELLED, Line, Marks
from headoff.figures.palette import OBJECT_COLOURS, UNMATCHED_COLOUR
from headoff.figures.placing import Rect, place_label
from headoff.figures.sheets import MOST_PICTURES
from headoff.figures.subsets import heads_text, subsets_by_size
from headoff.figures.survival import NARROW_WIDTH, narrow_height, survival_chart
from headoff.gates import (
    all_subsets,
    cumulative,
    heads_off,
    kind_of,
    layers_off,
    none_off,
    single_heads,
)
from headoff.outcomes import Status


def marks_on(ax):
    return next(artist for artist in ax.artists if isinstance(artist, Marks))


def drawn(ax):
    """The marks of the axes after a draw, and the renderer that measured them."""
    canvas = FigureCanvasAgg(ax.get_figure(root=True))
    canvas.draw()
    return marks_on(ax), canvas.get_renderer()


def assert_labels_within_image(ax):
    marks, renderer = drawn(ax)
    image = ax.get_window_extent(renderer)
    for text in marks.texts:
        extent = text.get_window_extent(renderer)
        assert extent.x0 >= image.x0 and extent.y0 >= image.y0, text.get_text()
        assert extent.x1 <= image.x1 and extent.y1 <= image.y1, text.get_text()
    return marks


@pytest.mark.parametrize("image_size", [(60, 80), (20, 200), (200, 20), (1, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_labels_never_leave_the_image(image_size, seed):
    names = ("dog", "a remarkably long-winded name of a class", "traffic light")
    image, result = crowd(9, image_size, names, seed)
    for configuration in (0, 5):
        ax = plot_detections(
            image,
            result.detections[configuration],
            outcome=result.outcomes[configuration],
            baseline=result.baseline,
        )
        assert assert_labels_within_image(ax).texts


def test_labels_stay_within_the_image_when_the_figure_changes():
    image, result = crowd(6, (60, 80))
    ax = plot_detections(image, result.baseline)
    figure = ax.get_figure(root=True)
    assert_labels_within_image(ax)
    figure.set_size_inches(1.6, 1.2)
    assert_labels_within_image(ax)
    figure.set_dpi(60)
    assert_labels_within_image(ax)


def test_many_boxes_are_not_all_labelled():
    image, result = crowd(40, configurations=cumulative(1))
    figure = next(iter(sweep_figures(image, result))).draw()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (ax,) = figure.axes
    (marks,) = (artist for artist in ax.artists if isinstance(artist, Marks))
    assert len(marks.marks) == 40 and len(marks.texts) == MOST_LABELLED
    assert f"40 kept; {MOST_LABELLED} of 40 boxes labelled" in [text.get_text() for text in ax.texts]


def test_a_crowd_is_drawn_with_few_calls():
    """What takes time is a call of the renderer: the boxes of a picture are one, however many they are."""

    def calls(count):
        image, result = crowd(count, (60, 80), configurations=[none_off()])
        ax = plot_detections(image, result.baseline, outcome=result.outcomes[0], baseline=result.baseline)
        canvas = FigureCanvasAgg(ax.get_figure(root=True))
        renderer = canvas.get_renderer()
        counted = []

        def counting(original):
            return lambda *arguments, **options: (counted.append(original), original(*arguments, **options))

        for name in ("draw_path", "draw_path_collection", "draw_text"):
            setattr(renderer, name, counting(getattr(renderer, name)))
        marks_on(ax).draw(renderer)
        return len(counted)

    most = calls(MOST_LABELLED)
    assert 1 < most and calls(90) <= most + MOST_LABELLED  # a label may have a line to its box


def test_label_is_cut_to_the_room_but_keeps_its_score():
    result = example([[0.5, 0.5, 0.9, 0.9]], [0], (100, 100), ("x" * 60,))
    ax = Figure(figsize=(1, 1)).add_axes((0, 0, 1, 1))
    plot_detections(None, result.baseline, ax, outcome=result.outcomes[0])
    (text,) = assert_labels_within_image(ax).texts
    assert text.get_text().startswith("#0 x") and text.get_text().endswith("… 1.00")


def test_a_label_has_class_and_score():
    image, result = crowd(1, (60, 80), ("dog",))
    marks, _ = drawn(plot_detections(image, result.baseline))
    assert [text.get_text() for text in marks.texts] == [f"dog {result.baseline[0].score:.2f}"]


def test_dollars_in_class_names_are_no_formula():
    image, result = crowd(2, (60, 80), (r"$\frac$", "a\nb"))
    assert_labels_within_image(plot_detections(image, result.baseline, title=r"$\oops$"))
    plot_survival(result).get_figure(root=True).draw_without_rendering()
    plot_outcomes(result).get_figure(root=True).draw_without_rendering()


def test_labels_keep_clear_of_each_other_where_there_is_room():
    image, box = Rect(0, 0, 400, 400), Rect(100, 100, 200, 200)
    placed = []
    for _ in range(8):
        placed.append(place_label(box, 60, 15, image, placed, [box]))
    assert all(one.overlap(other) == 0 for one, other in combinations(placed, 2))


def test_a_label_goes_on_its_box_or_inside_where_the_image_ends():
    image = Rect(0, 0, 400, 400)
    middle = Rect(100, 100, 200, 200)
    assert place_label(middle, 60, 15, image, [], [middle])[:2] == (100, 200)
    at_top = Rect(100, 100, 200, 400)
    spot = place_label(at_top, 60, 15, image, [], [at_top])
    assert spot.touches(at_top) and spot.y1 <= 400
    at_right = Rect(380, 100, 400, 200)
    assert place_label(at_right, 60, 15, image, [], [at_right]).x1 == 400


def test_colours_stay_with_objects():
    image, result = scene_example()
    for detections, outcome in zip(result.detections, result.outcomes, strict=True):
        ax = plot_detections(image, detections, outcome=outcome, baseline=result.baseline)
        marks = marks_on(ax).marks
        for mark in marks:
            colour = UNMATCHED_COLOUR if mark.object is None else object_colour(mark.object)
            assert mark.colour == colour
        assert {mark.object for mark in marks} >= {one.object for one in outcome.outcomes}
        assert sum(mark.object is None for mark in marks) == len(outcome.unmatched)


def test_every_status_has_its_looks():
    image, result = crowd(40, (60, 80))
    seen = set()
    for detections, outcome in zip(result.detections, result.outcomes, strict=True):
        ax = plot_detections(image, detections, outcome=outcome, baseline=result.baseline)
        for one in outcome.outcomes:
            mine = [mark for mark in marks_on(ax).marks if mark.object == one.object]
            lines = [mark.line for mark in mine]
            seen.add(one.status)
            assert lines.count(Line.FOUND) == (one.status is not Status.LOST)
            assert lines.count(Line.DUPLICATE) == max(len(one.detections) - 1, 0)
            assert lines.count(Line.WAS) == (one.status in (Status.LOST, Status.MOVED))
            if one.status is Status.LOST:
                assert (mine[0].box, mine[0].note) == (result.baseline[one.object].box, "lost")
            if one.status is Status.RELABELLED:
                assert " → " in mine[0].name
    assert seen == set(Status)


def test_without_an_outcome_detections_have_colours_of_their_own():
    image, result = crowd(3, (60, 80))
    marks = marks_on(plot_detections(image, result.baseline)).marks
    assert [mark.colour for mark in marks] == [*OBJECT_COLOURS[:3]]


@pytest.mark.parametrize("objects", [0, 1])
def test_none_and_one(objects):
    image, result = crowd(objects, (30, 40), configurations=cumulative(2))
    for figure in sweep_figures(image, result):
        figure.draw().draw_without_rendering()
    survival = plot_survival(result)
    written = " ".join(text.get_text() for text in survival.texts)
    assert ("No object" in written) == (objects == 0)
    assert len(plot_outcomes(result).get_yticks()) == objects + 2


def test_given_axes_are_drawn_in_and_returned():
    image, result = crowd(2, (30, 40))
    for axes, plot in zip(
        Figure().subplots(3),
        (
            lambda ax: plot_detections(image, result.baseline, ax),
            lambda ax: plot_survival(result, ax),
            lambda ax: plot_outcomes(result, ax),
        ),
        strict=True,
    ):
        assert plot(axes) is axes


def test_survival_has_a_line_for_each_object_in_its_colour():
    _, result = scene_example()
    ax = plot_survival(result)
    assert ax.get_xlabel() == "number of heads off"
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 9 and line.get_linestyle() != "None"]
    for index, line in enumerate(lines[: len(result.baseline)]):
        assert line.get_color() == object_colour(index)
        assert line.get_ydata().tolist() == result.survival()[index].tolist()
    names = [text.get_text() for text in ax.texts]
    assert names == [f"#{i} {found.class_name}" for i, found in enumerate(result.baseline)]


MANY_OTHERS = [heads_off(head, layers=[0, 1]) for head in range(8)]
CHARTS = {
    "plot_cumulative": cumulative(),
    "plot_bars": [heads_off(3)],
    "plot_head_changes": single_heads(),
    "plot_subsets": all_subsets(3),
    "plot_changes": MANY_OTHERS,
}


@pytest.mark.parametrize(("name", "configurations"), CHARTS.items())
def test_the_chart_suits_the_kind_of_sweep(name, configurations):
    _, result = crowd(2, (30, 40), configurations=configurations)
    assert survival_chart(result).plot.__name__ == name
    _, twice = crowd(2, (30, 40), configurations=[none_off(), *configurations][::-1])
    # The order of configurations and a further baseline change only a cumulative sweep and the subsets.
    assert name in ("plot_cumulative", "plot_subsets") or survival_chart(twice).plot.__name__ == name


@pytest.mark.parametrize("objects", [0, 1, 20])
@pytest.mark.parametrize(
    "configurations",
    [*CHARTS.values(), single_heads(1, 8), single_heads(8, 1), single_heads(1, 1), [none_off()]],
)
def test_every_chart_draws_with_its_texts_within_the_figure(objects, configurations):
    names = ("a remarkably long-winded name of a class", r"$\frac$")
    _, result = crowd(objects, (30, 40), names, configurations=configurations)
    drawings = [plot_survival(result)]
    if (height := narrow_height(result)) is not None:
        narrow = Figure(figsize=(NARROW_WIDTH, height), layout="constrained").add_subplot()
        drawings.append(plot_survival(result, narrow))
    for ax in drawings:
        figure = ax.get_figure(root=True)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        extent = ax.get_tightbbox(canvas.get_renderer())
        assert extent.x0 >= -2 and extent.x1 <= figure.bbox.x1 + 2
        assert extent.y0 >= -2 and extent.y1 <= figure.bbox.y1 + 2


def test_a_cell_of_single_heads_is_the_largest_change_of_any_object():
    _, result = scene_example(configurations=[none_off(), *single_heads()][::-1])
    sweep = kind_of(result.configurations)
    found, by_object = head_changes(result, sweep), changes(result)
    for row, layer in enumerate(sweep.layers):
        for column, head in enumerate(sweep.heads):
            place = result.configurations.index(heads_off(head, layers=[layer]))
            values = by_object[:, place]
            assert abs(found.values[row, column]) == max(abs(values))
            assert found.values[row, column] == values[found.objects[row, column]]
            letters = {"M": Status.MOVED, "D": Status.DUPLICATED, "R": Status.RELABELLED, "L": Status.LOST}
            told = {letters[one[-1]]: int(one[:-1]) for one in str(found.statuses[row, column]).split()}
            counts = result.outcomes[place].counts
            assert told == {status: n for status, n in counts.items() if n and status is not Status.KEPT}
    before = torch.tensor([one.score for one in result.baseline])[:, None]
    assert torch.allclose(torch.as_tensor(by_object).float(), result.survival() - before, atol=1e-6)

    ax = plot_survival(result)
    written = [
        (f"{value:+.2f}\n#{object}".replace("-", "−") if abs(value) >= 0.005 else "0") + f"\n{status}"
        for value, object, status in zip(
            found.values.flat, found.objects.flat, found.statuses.flat, strict=True
        )
    ]
    assert [text.get_text() for text in ax.texts] == [text.rstrip() for text in written]
    explained = {text.get_text() for text in ax.get_legend().get_texts()}
    assert explained >= {
        "fall",
        "rise",
        "0: below 0.005",
        "#2: the object's number",
        "not kept",
        "2L: 2 lost",
    }


def test_single_heads_by_object():
    image, result = crowd(5, (30, 40), configurations=single_heads())
    titles = [ax.get_title("left") for ax in head_changes_by_object(result).axes]
    assert [title for title in titles if title] == [
        f"#{i} {one.class_name}" for i, one in enumerate(result.baseline)
    ]
    assert "survival-by-object" in [figure.stem for figure in sweep_figures(image, result)]
    image, result = crowd(7, (30, 40), configurations=single_heads())
    assert "survival-by-object" not in [figure.stem for figure in sweep_figures(image, result)]


def test_subsets_by_size():
    _, result = scene_example(configurations=all_subsets(4))
    sizes = subsets_by_size(result, kind_of(result.configurations))
    assert [len(one.found) for one in sizes] == [1, 4, 6, 4, 1]
    found = {
        configuration.text: len(result.baseline)
        - outcome.counts[Status.LOST]
        - outcome.counts[Status.RELABELLED]
        for configuration, outcome in zip(result.configurations, result.outcomes, strict=True)
    }
    for one in sizes:
        assert found[heads_off(*one.best).text] == one.most == max(one.found)
        assert found[heads_off(*one.worst).text] == one.fewest == min(one.found)
    written = [text.get_text() for text in plot_survival(result).texts]
    assert {heads_text(heads) for one in sizes for heads in (one.best, one.worst)} <= {*written}
    assert heads_text((0, 1, 2, 5)) == "H0-2+5"


def test_bars_start_with_none_off_and_have_a_bar_for_each_object():
    _, result = scene_example(configurations=[heads_off(3), layers_off(5)])
    ax = plot_survival(result)
    assert [t.get_text() for t in ax.texts if t.get_fontweight() == "bold"] == [
        "none off",
        "H3 off",
        "L5 off",
    ]
    scores = [one.score for one in result.baseline] + result.survival().T.flatten().tolist()
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(scores)


def test_spread_keeps_order_and_distance():
    values = [0.5, 0.5, 0.51, 1.0, 0.0, 0.99]
    placed = spread(values, 0.1, 0, 1)
    ordered = sorted(placed)
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(ordered, ordered[1:], strict=False))
    assert min(placed) >= 0 and max(placed) <= 1
    assert sorted(range(6), key=placed.__getitem__) == sorted(range(6), key=lambda i: (values[i], -i))


def test_figures_of_a_cumulative_sweep():
    image, result = crowd(1, (30, 40))
    figures = [*sweep_figures(image, result)]
    assert [figure.stem for figure in figures] == [
        "00-none-off",
        *(f"{k:02}-first-{k}-off" for k in range(1, 9)),
        "grid-none-off",
        "grid-first-1-4-off",
        "grid-first-5-8-off",
        "survival",
        "outcomes",
    ]
    axes = figures[-3].draw().axes
    assert [ax.get_title("left") for ax in axes] == [f"first {k} off" for k in (5, 6, 7, 8)]


def test_figures_of_other_configurations():
    image, result = crowd(1, (30, 40), configurations=[heads_off(2, layers=[5]), heads_off(3)])
    stems = [figure.stem for figure in sweep_figures(image, result)]
    assert stems == ["baseline", "00-l5h2-off", "01-h3-off", "grid-pictures-1-3", "survival", "outcomes"]


def test_figures_of_very_many_configurations_are_capped():
    image, result = crowd(1, (30, 40), configurations=all_subsets())
    figures = [*sweep_figures(image, result)]
    assert len(figures) == MOST_PICTURES + MOST_PICTURES // 4 + 2
    assert len({figure.stem for figure in figures}) == len(figures)
    plot_outcomes(result).get_figure(root=True).draw_without_rendering()


def test_drawing_is_at_the_figure_s_resolution_not_the_image_s():
    for size in ((1, 1), (10, 100), (3000, 4000)):
        result = example([[0.5, 0.5, 0.4, 0.4]], [0], size)
        figure = next(iter(sweep_figures(photo(size), result))).draw()
        width, height = figure.get_size_inches() * figure.dpi
        assert 300 < width < 1700 and 150 < height < 1800


def test_names_of_files():
    assert slug("query 17: L5H2=0.5; L0") == "query-17-l5h2-0-5-l0"
    assert slug("→") == "configuration"


def test_views_show_the_baseline_once():
    _, result = crowd(2, (30, 40))
    assert [view.title for view in views(result)][:2] == ["none off", "first 1 off"]
    _, result = crowd(2, (30, 40), configurations=[heads_off(3)])
    baseline, other = views(result)
    assert (baseline.title, baseline.configuration, other.configuration) == ("none off", None, 0)
    assert baseline.outcome.counts[Status.KEPT] == 2


# Machado, Oliveira, Fernandes: "A Physiologically-based Model for Simulation of Color Vision Deficiency".
SIGHT = {
    "normal": [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
# Ottosson's OKLab: linear sRGB to cone responses, their cube roots to lightness and two hues.
TO_CONES = torch.tensor(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = torch.tensor(
    [
        [0.2104542553, 0.793617785, -0.0040720468],
        [1.9779984951, -2.428592205, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.808675766],
    ]
)


@pytest.mark.parametrize("sight", SIGHT)
def test_object_colours_differ_for_every_sight(sight):
    def lab(colour):
        rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = (torch.tensor(SIGHT[sight]) @ linear).clamp(0, 1)
        return TO_LAB @ (TO_CONES @ seen) ** (1 / 3)

    labs = [lab(colour) for colour in OBJECT_COLOURS]
    assert min(float((one - other).norm()) for one, other in combinations(labs[:8], 2)) >= 0.07
    if sight == "normal":
        assert min(float((one - other).norm()) for one, other in combinations(labs, 2)) >= 0.05
    # Grey would be taken for a detection of nothing.
    assert all(
        colorsys.rgb_to_hls(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))[2] > 0.3
        for colour in OBJECT_COLOURS
    )
