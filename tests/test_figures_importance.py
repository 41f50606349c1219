"""Pictures of what heads contribute: the numbers, names and marks that are in them."""

import math
import sys

import numpy as np
import pytest
import torch
from importance_examples import MEASURES, importance_of
from matplotlib.patches import Rectangle

import headoff
from headoff.errors import SettingError
from headoff.figures import (
    compare_measures,
    head_card,
    importance_by_object,
    importance_figures,
    plot_ablations,
    plot_columns,
    plot_curves,
    plot_importance,
    plot_interactions,
)
from headoff.figures.canvas import figure_of
from headoff.figures.importance import decimals_of, score_text
from headoff.figures.importance_comparisons import rank_correlation, rank_correlations
from headoff.figures.matrix import colour
from headoff.figures.pictures import small_picture
from headoff.importance import HeadCards, Scores
from headoff.importance.curves import removal_curves
from headoff.importance.result import HeadImportance, Key


def cell_texts(ax):
    """Texts of a matrix by (row, column)."""
    return {
        (round(text.get_position()[1]), round(text.get_position()[0])): text.get_text()
        for text in ax.texts
        if text.get_zorder() == 4
    }


def legend_of(owner):
    (legend,) = owner.legends if hasattr(owner, "legends") else [owner.get_legend()]
    return [text.get_text() for text in legend.get_texts()], legend.get_title().get_text()


@pytest.mark.parametrize(
    "value, decimals, text",
    [(0.314, 2, "+0.31"), (-0.314, 2, "−0.31"), (0.004, 2, "0"), (-0.0049, 2, "0"), (0.005, 3, "+0.005")],
)
def test_scores_in_words(value, decimals, text):
    assert score_text(value, decimals) == text


def test_decimals_follow_the_scale():
    assert [decimals_of(limit) for limit in (12.0, 1.0, 0.31, 0.031, 0.00031)] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize("object", [None, 1])
def test_a_matrix_shows_every_score_in_its_colour(object):
    importance = importance_of()
    ax = plot_importance(importance, object, measure="removal")
    scores = importance.get("removal").scores
    shown = scores.mean(0) if object is None else scores[object]
    limit = float(scores.abs().max())  # one scale for all objects
    texts = cell_texts(ax)
    assert texts == {(r, c): score_text(float(shown[r, c]), decimals_of(limit)) for r, c in np.ndindex(3, 4)}
    faces = ax.collections[0].get_facecolors()
    expected = [colour(float(value), limit) for value in shown.flatten()]
    assert [tuple(np.round(face[:3], 3)) for face in faces] == [
        tuple(np.round([int(one[i : i + 2], 16) / 255 for i in (1, 3, 5)], 3)) for one in expected
    ]
    labels, title = legend_of(ax)
    assert labels == ["takes from it", "adds to it"]
    assert ("mean of 3 objects" if object is None else "#1 a <b> & $c$") in title and "zero ablation" in title


def test_what_is_not_certain_is_hatched():
    importance = importance_of()
    found = importance.get("shapley")
    ax = plot_importance(importance, 2, measure="shapley")
    hatched = {
        (round(patch.get_y() + 0.44), round(patch.get_x() + 0.47))
        for patch in ax.get_children()
        if isinstance(patch, Rectangle) and patch.get_hatch()
    }
    unclear = found.scores[2].abs() <= 1.96 * found.errors[2]
    assert hatched == {tuple(place) for place in unclear.nonzero().tolist()} and 0 < len(hatched) < 12
    assert "interval spans 0" in legend_of(ax)[0]


def test_a_matrix_for_each_object_and_the_mean():
    importance = importance_of()
    figure = importance_by_object(importance, measure="removal", ablation="uniform")
    axes = [ax for ax in figure.axes if cell_texts(ax)]
    titles = [ax.get_title(loc="left") for ax in axes]
    assert titles == ["mean of 3 objects", "#0 dog", "#1 a <b> & $c$", "#2 cat"]
    assert "uniform ablation" in legend_of(figure)[1]
    scores = importance.get("removal", "probability", "uniform").scores
    decimals = decimals_of(float(scores.abs().max()))
    assert cell_texts(axes[3])[1, 2] == score_text(float(scores[2, 1, 2]), decimals)
    of_image = importance_by_object(importance, measure="removal", value="unmatched")
    assert [ax.get_title(loc="left") for ax in of_image.axes if cell_texts(ax)] == ["the image"]


def test_columns_have_a_bar_for_each_object():
    importance = importance_of()
    ax = plot_columns(importance)
    scores = importance.get("shapley_columns").scores[:, 0]
    heights = [[bar.get_height() for bar in container] for container in ax.containers]
    assert np.allclose(heights, scores.numpy())
    assert legend_of(ax)[0] == ["#0 dog", "#1 a <b> & $c$", "#2 cat", "mean over objects"]
    lines = ax.collections[0].get_segments()
    assert np.allclose([line[0][1] for line in lines], scores.mean(0).numpy())
    with pytest.raises(SettingError, match="scores the heads of each layer"):
        plot_columns(importance, measure="removal")


def test_interactions_say_what_their_sign_means():
    importance = importance_of()
    ax = plot_interactions(importance, 0)
    pairs = importance.get("shapley_columns").interactions[:, 0]
    texts = cell_texts(ax)
    assert (
        texts[1, 3] == texts[3, 1] == score_text(float(pairs[0, 1, 3]), decimals_of(float(pairs.abs().max())))
    )
    assert legend_of(ax)[0] == ["negative: redundant", "positive: need each other"]
    with pytest.raises(SettingError, match="has no interactions"):
        plot_interactions(importance, measure="removal")


def test_rank_correlation_is_that_of_ranks():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 5, 40), generator.normal(size=40)
    stats = pytest.importorskip("scipy.stats")
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation(b, np.exp(b)) == pytest.approx(1)
    assert math.isnan(rank_correlation(a, np.zeros(40)))


def test_measures_are_compared_by_head_and_by_column():
    importance = importance_of()
    names, found = rank_correlations(importance)
    assert names == MEASURES and np.allclose(np.diag(found), 1) and np.allclose(found, found.T)
    removal, columns = (importance.mean_scores(name) for name in ("removal", "shapley_columns"))
    assert found[0, 2] == pytest.approx(rank_correlation(removal.sum(0).numpy(), columns[0].numpy()))
    assert rank_correlations(importance, "duplicates")[0] == ("removal", "shapley_columns", "shapley")
    figure = compare_measures(importance)
    matrices = [ax for ax in figure.axes if cell_texts(ax)]
    assert [ax.get_title(loc="left").split("\n")[0] for ax in matrices] == [
        *MEASURES,
        "rank correlation of heads",
    ]
    assert cell_texts(matrices[-1])[0, 2] == score_text(found[0, 2], 2)


def test_two_ablation_kinds_in_one_scatter():
    importance = importance_of()
    ax = plot_ablations(importance, measure="removal")
    zero, uniform = (importance.mean_scores("removal", None, kind).numpy() for kind in ("zero", "uniform"))
    points = [line.get_xydata() for line in ax.lines if line.get_marker() == "o"]
    assert np.allclose(np.concatenate(points), np.stack([zero.ravel(), uniform.ravel()], axis=1))
    most = np.unravel_index(np.hypot(zero, uniform).argmax(), zero.shape)
    places = {text.get_text(): text.xy for text in ax.texts}
    assert places[f"L{most[0]}H{most[1]}"] == (zero[most], uniform[most])
    assert ax.get_xlabel() == "zero ablation" and ax.get_ylabel() == "uniform ablation"
    with pytest.raises(SettingError, match="two ablation kinds are compared"):
        plot_ablations(importance_of(ablations=("zero",)))


@pytest.mark.parametrize("which", [{"object": 3}, {"object": -1}, {"measure": "remval"}, {"value": "iou"}])
def test_what_cannot_be_drawn(which):
    with pytest.raises(SettingError):
        plot_importance(importance_of(), **which)


def test_nothing_to_score_is_said():
    importance = importance_of(0, values=("probability",))
    for ax in (plot_importance(importance), plot_columns(importance), plot_interactions(importance)):
        assert "No object is detected" in ax.texts[0].get_text()
    assert "No object" in figure_of(plot_ablations(importance)).axes[0].texts[0].get_text()
    assert [*importance_figures(headoff.sample_image(0), importance)] == []


def test_methods_draw_the_same():
    importance = importance_of()
    assert cell_texts(importance.plot(object=1)) == cell_texts(plot_importance(importance, 1))
    assert len(importance.plot_columns(value="duplicates").containers) == 3
    assert importance.plot_interactions().get_xlabel() == "head"
    assert importance.plot_ablations(measure="removal").get_xlabel() == "zero ablation"
    html = importance._repr_html_()
    assert html.count("<tr>") == 13 and "12 heads of decoder_cross" in html


@pytest.fixture(scope="module")
def scene(one_detector):
    image = headoff.sample_image(0)
    importance = headoff.heads(
        one_detector, image, measures="removal", values="probability", ablations=("zero", "uniform")
    )
    return image, importance, HeadCards.of(one_detector, image, importance)


@pytest.fixture(scope="module")
def one_detector():
    return headoff.load("scenes")


def test_cards_have_the_detections_without_each_head(scene, one_detector):
    image, importance, cards = scene
    layers, heads = importance.shape
    places = {(layer, head): f"L{layer}H{head}" for layer in range(layers) for head in range(heads)}
    places |= {(None, head): f"H{head}" for head in range(heads)}
    result = cards.sweeps["uniform"]
    assert {place: result.configurations[cards.index(place[1], place[0])].text for place in places} == places
    alone = headoff.sweep(one_detector, image, "L0H4", ablation="uniform")
    assert torch.allclose(result.logits[cards.index(4, 0)], alone.logits[0], atol=1e-4)
    found = importance.get("removal", "probability", "uniform").scores[:, 0, 4]
    before, after = (
        torch.tensor([o.query_score for o in one.outcomes])
        for one in (headoff.sweep(one_detector, image, "none").outcomes[0], result.outcomes[4])
    )
    assert torch.allclose(found.float(), before - after, atol=1e-4)
    with pytest.raises(SettingError, match="there is no head 8 in layer 0"):
        cards.index(8, 0)


def test_the_card_of_a_head(scene):
    image, importance, cards = scene
    figure = head_card(image, importance, cards, 4, 0, ablation="uniform")
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert (
        titles[:2] == ["none off", "without it (uniform ablation)"] and titles[2] == "looks at, for #0 cross"
    )
    assert figure.get_suptitle() == "layer 0, head 4 (decoder_cross)"
    numbers = [text.get_text() for text in figure.axes[-1].texts]
    score = float(importance.mean_scores("removal", "probability", "uniform")[0, 4])
    limit = float(importance.mean_scores("removal", "probability", "uniform").abs().max())
    assert numbers == [
        "mean over objects, uniform ablation",
        "probability",
        "removal",
        score_text(score, decimals_of(limit)),
    ]


@pytest.mark.usefixtures("blank_figures")
def test_the_figures_of_a_report(scene):
    image, importance, cards = scene
    drawn = list(importance_figures(image, importance, cards))
    stems = [figure.stem for figure in drawn]
    assert stems[:3] == ["zero-removal", "uniform-removal", "zero-uniform-removal"] and len(
        set(stems)
    ) == len(stems)
    assert [stem for stem in stems if stem.startswith("head-")][0] == "head-l0h4" and len(stems) == 6
    for figure in drawn[:3]:
        figure.draw().canvas.draw()
    assert small_picture(image).size == (192, 192)


def test_results_as_xarray(monkeypatch):
    xarray = pytest.importorskip("xarray")
    importance = importance_of()
    data = importance.to_xarray()
    found = importance.get("removal", "duplicates", "uniform").scores
    chosen = data.removal.sel(ablation="uniform", value="duplicates")
    assert chosen.dims == ("object", "layer", "head") and np.array_equal(chosen, found)
    columns = data.shapley_columns_interactions.sel(ablation="zero", value="probability", object="#2 cat")
    assert np.array_equal(columns, importance.get("shapley_columns").interactions[2, 0])
    assert data.removal_image.dims == ("ablation", "image_value", "layer", "head")
    assert (
        bool(data.gradient.sel(value="duplicates").isnull().all()) and data.attrs["site"] == "decoder_cross"
    )
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(SettingError, match="a Dataset needs xarray: `pip install xarray`"):
        importance.to_xarray()
    assert xarray


def test_results_as_dataframes():
    pytest.importorskip("pandas")
    importance = importance_of()
    frame = importance.to_dataframe()
    assert len(frame) == sum(found.scores.numel() for found in importance.scores.values())
    row = frame[
        (frame.ablation == "zero") & (frame.measure == "removal") & (frame.value == "probability")
    ].iloc[17]
    assert (row.object, row.layer, row["head"]) == (1, 1, 1)
    assert row.score == float(importance.get("removal").scores[1, 1, 1])


def test_heads_in_all_layers_alone():
    """Where only columns are scored, they have the figures, and cards of heads in all layers."""
    importance = importance_of()
    only = {key: found for key, found in importance.scores.items() if key.measure == "shapley_columns"}
    columns = HeadImportance(
        importance.objects, "decoder_cross", (3, 4), only, importance.totals, importance.image_values
    )
    assert [figure.stem for figure in importance_figures(headoff.sample_image(0), columns)] == [
        "zero-shapley-columns",
        "zero-interactions",
        "uniform-shapley-columns",
        "uniform-interactions",
        "zero-uniform-shapley-columns",
    ]
    assert isinstance(only[Key("zero", "shapley_columns", "probability")], Scores)


def test_removal_curves_have_the_numbers_and_heads_of_their_orders():
    values = torch.rand(8, generator=torch.Generator().manual_seed(0)).double()
    curves = removal_curves(values, (2, 0, 1), (1, 0, 2))
    ax = plot_curves(curves, value="iou")
    drawn = [line.get_ydata().tolist() for line in ax.get_lines()]
    assert drawn == [
        getattr(curves, name).tolist() for name in ("random", "by_number", "most_first", "least_first")
    ]
    band = ax.collections[0].get_paths()[0].vertices
    for k in range(4):
        heights = band[band[:, 0] == k][:, 1]
        assert {heights.min(), heights.max()} == {curves.low[k].item(), curves.high[k].item()}
    names = [text.get_text() for text in ax.texts]
    assert names == ["least", "H2", "H0", "H1", "most", "H1", "H0", "H2"]
    assert ax.get_ylabel() == "iou, mean over objects"
