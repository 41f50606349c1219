"""Pictures of relevance maps, and their part of the report."""

import base64
import csv
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch
from explanation_examples import explanation_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sweep_examples import crowd, example, scene_example

import headoff
from headoff.errors import SettingError
from headoff.figures import relevance_figures
from headoff.figures.colouring import OPACITY, SMOOTHING, MapStyle, coloured
from headoff.figures.object_views import object_views
from headoff.figures.relevance import NOTHING_TO_EXPLAIN, plot_head_attention, plot_map, plot_relevance_grid
from headoff.figures.relevance_sheets import MOST_OBJECTS
from headoff.gates import none_off
from headoff.relevance import load_explanation
from headoff.report import maps as report_maps
from headoff.report import write_report
from headoff.report.evidence import evidence, headline
from headoff.report.maps import page_maps
from headoff.report.page import render_page

IMAGE, RESULT = scene_example()
EXPLANATION = explanation_of(RESULT)
OBJECTS, LAYERS = len(RESULT.baseline), len(EXPLANATION.layers)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def map_pixels(ax):
    """What was painted of maps: pictures with opacity, in the order of objects, the large map and all layers."""
    arrays = [np.asarray(image.get_array()) for image in ax.images]
    return [array for array in arrays if array.shape[-1] == 4]


def pixels(ax):
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


# Colours


def test_plain_colours_are_the_colour_maps():
    found = coloured(torch.tensor([[0.0, 1.0]]), MapStyle(overlay=False))
    assert found.dtype == np.uint8 and found.shape == (1, 2, 4)
    assert found[0, 0].tolist() == [8, 48, 107, 255] and found[0, 1].tolist() == [247, 251, 255, 255]


def test_on_an_image_what_has_no_relevance_hides_nothing():
    found = coloured(torch.tensor([[0.0, 0.01, 0.1, 1.0]]), MapStyle())
    least, faint, some, greatest = found[0, :, 3].tolist()
    assert least == faint == 0 < some < greatest == round(255 * OPACITY)


def test_a_smooth_map_has_the_values_of_its_tokens_in_their_middles():
    found = coloured(torch.tensor([[0.0, 1.0]]), MapStyle(overlay=False, cmap="gray", smooth=True))
    assert found.shape == (SMOOTHING, 2 * SMOOTHING, 4)
    across = found[0, :, 0].astype(int)
    assert (np.diff(across) >= 0).all() and across[0] == 0 and across[-1] == 255
    assert abs(across[SMOOTHING - 1] + across[SMOOTHING] - 255) <= 1


@pytest.mark.parametrize(
    "arguments, named", [({"cmap": "Bluesr"}, "'Blues_r'"), ({"scale": "maps"}, "map, object, sweep")]
)
def test_styles_that_are_invalid(arguments, named):
    with pytest.raises(SettingError, match=named):
        MapStyle(**arguments)


# Grids


@pytest.mark.parametrize("objects", [0, 1, 2, 7])
def test_any_number_of_objects(objects):
    boxes = [[0.2 + 0.1 * index, 0.5, 0.2, 0.2] for index in range(objects)]
    result = example(boxes, list(range(objects)), (192, 192))
    explanation = explanation_of(result)
    ax = plot_relevance_grid(explanation, 0, image=np.full((192, 192, 3), 90, np.uint8))
    written = texts(ax)
    assert written[0] == "none off"
    assert len(map_pixels(ax)) == objects * (1 + LAYERS)
    if objects == 0:
        assert " ".join(written[1:]) == NOTHING_TO_EXPLAIN
    for view in object_views(explanation, 0):
        assert f"{view.heading}, query {view.query}" in written
    assert written.count("layer 3") == objects
    assert pixels(ax).std() > 0


def test_titles_follow_the_configuration():
    views = object_views(EXPLANATION, 5)
    written = texts(plot_relevance_grid(EXPLANATION, 5))
    assert written[0] == "first 5 off"
    for view in views:
        assert f"{view.heading}, {view.origin}" in written and f"was {view.first_score:.2f}" in " ".join(
            written
        )


def test_no_evidence_is_said_and_never_drawn():
    for scale in ("map", "object", "sweep"):
        ax = plot_relevance_grid(EXPLANATION, 8, image=IMAGE, style=MapStyle(scale))
        assert map_pixels(ax) == []
        assert " ".join(texts(ax)).replace("\n", " ").count("no image evidence") == OBJECTS * (1 + LAYERS)


def test_a_constant_map_has_one_colour():
    maps = EXPLANATION.maps.clone()
    maps[0, 0, 0] = 0.3 + 1e-8 * torch.rand(maps.shape[-2:])
    (found,) = map_pixels(plot_map(replace(EXPLANATION, maps=maps), 0, 0, 0, style=MapStyle("map")))
    assert len(np.unique(found.reshape(-1, 4), axis=0)) == 1


def test_on_one_scale_a_dying_map_looks_dying():
    def brightness(configuration, scale):
        (found,) = map_pixels(plot_map(EXPLANATION, configuration, OBJECTS - 1, style=MapStyle(scale)))
        return found[..., :3].max()

    assert brightness(0, "sweep") > 240 > 180 > brightness(6, "sweep")
    assert brightness(6, "map") > 240


def test_maps_in_axes_that_are_given():
    figure = Figure(figsize=(8, 3))
    left, right = figure.subplots(1, 2)
    assert plot_map(EXPLANATION, 0, 0, 2, left, image=IMAGE, title="mine") is left
    assert plot_relevance_grid(EXPLANATION, -2, right) is right
    assert texts(left) == ["mine"]
    # Letters shrink with the grid.
    assert max(text.get_fontsize() for text in right.texts) < 6


def test_tokens_beyond_the_border_are_cut():
    """The last column of a grid that exceeds the image is clipped to the image."""
    explanation = explanation_of(RESULT, resized=(180, 180))
    ax = plot_map(explanation, 0, 0, style=MapStyle("map"))
    figure = Figure(figsize=(6, 4))
    inner = figure.add_axes((0, 0, 0.5, 1))
    plot_map(explanation, 0, 0, ax=inner, style=MapStyle("map"))
    painted = pixels(inner)
    assert (painted[:, painted.shape[1] * 2 // 3 :, :3] == 255).all()
    right, bottom = ax.images[0].get_extent()[1:3]
    assert right > ax.get_xlim()[1] and bottom > ax.get_ylim()[0]


def test_heads_that_are_off_are_said_to_be():
    explanation = explanation_of(RESULT, heads=True)
    ax = plot_head_attention(explanation, 3, 1, image=IMAGE)
    assert texts(ax).count("off") == 3 * LAYERS
    assert len(map_pixels(ax)) == 5 * LAYERS
    with pytest.raises(SettingError, match="heads=True"):
        plot_head_attention(EXPLANATION)


def test_an_object_that_is_not_found():
    queries = EXPLANATION.queries.clone()
    queries[4, 0] = -1
    maps = EXPLANATION.maps.clone()
    maps[4, 0] = 0
    explanation = replace(EXPLANATION, queries=queries, labels=queries, maps=maps, pick="object")
    written = texts(plot_relevance_grid(explanation, 4))
    assert " ".join(written).replace("\n", " ").count("not found") == LAYERS + 2
    assert f"{object_views(explanation, 4)[0].name} not found, was" in " ".join(written)


@pytest.mark.parametrize("arguments", [{"configuration": 9}, {"object": 60}, {"layer": 7}])
def test_maps_that_are_not_there(arguments):
    with pytest.raises(SettingError, match="there is no"):
        plot_map(EXPLANATION, **arguments)


def test_numbers_are_those_of_the_sweep():
    """Whoever asks for some queries alone finds the numbers and colours that the other pictures have."""
    chosen = replace(
        EXPLANATION,
        objects=replace(
            RESULT.baseline,
            **{
                name: getattr(RESULT.baseline, name)[1:2] for name in ("queries", "labels", "scores", "boxes")
            },
        ),
        queries=EXPLANATION.queries[:, 1:2],
        labels=EXPLANATION.labels[:, 1:2],
    )
    (view,) = object_views(chosen, 0, baseline=RESULT.baseline)
    assert (view.name, view.colour) == (
        object_views(EXPLANATION, 0)[1].name,
        object_views(EXPLANATION, 0)[1].colour,
    )
    (stranger,) = object_views(chosen, 0, baseline=example([], [], (192, 192)).baseline)
    assert "#" not in stranger.name


def test_names_of_figures():
    image, result = crowd(8, configurations=headoff.cumulative(2))
    explanation = explanation_of(result, layers=1, heads=True)
    stems = [
        figure.stem
        for figure in relevance_figures(image, explanation, style=MapStyle(), baseline=result.baseline)
    ]
    assert len(set(stems)) == len(stems) == 3 * (2 + 8)
    assert stems[0] == "relevance-00-none-off-objects-0-5" and stems[1].endswith("-objects-6-7")
    assert f"heads-02-first-2-off-query-{result.baseline[7].query}" in stems


# The page


def page_data(page):
    found = re.search(r'<script type="application/json" id="maps-data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1]) if found else None


@pytest.mark.usefixtures("blank_figures")
def test_the_page_has_the_maps():
    data = page_data(render_page(IMAGE, RESULT, {"image": "scene"}, EXPLANATION))
    assert data["frames"] == [*range(9)] and len(data["objects"]) == OBJECTS
    channel = data["channels"][0]
    shades = np.frombuffer(base64.b64decode(channel["bytes"]), np.uint8).reshape(EXPLANATION.maps.shape)
    least, greatest = (
        np.array(channel[end]).reshape(*EXPLANATION.maps.shape[:3], 1, 1) for end in ("least", "greatest")
    )
    read = least + (greatest - least) * shades / 255
    # Half a shade of the map's own range, faint or not, and the digits left out.
    assert (np.abs(read - EXPLANATION.maps.numpy()) <= 0.51 / 255 * greatest + 1e-4 * greatest).all()
    assert (np.array(channel["greatest"]).reshape(9, -1)[-1] == 0).all()


@pytest.mark.usefixtures("blank_figures")
def test_the_page_without_objects_says_so():
    result = example([], [], (192, 192))
    page = render_page(np.zeros((192, 192, 3), np.uint8), result, {}, explanation_of(result))
    assert "nothing to explain" in page and page_data(page) is None


@pytest.mark.usefixtures("blank_figures")
def test_a_page_of_one_configuration_is_about_the_explanation():
    image, result = scene_example(configurations=headoff.cumulative()[:1])
    page = render_page(image, result, {}, explanation_of(result))
    assert html.escape(headline(result, explanation_of(result))) in page
    assert "survival-title" not in page


@pytest.mark.usefixtures("blank_figures")
def test_pages_without_explanation_have_no_trace_of_it():
    page = render_page(IMAGE, RESULT, {})
    assert "maps-data" not in page and "map-row" not in page


@pytest.mark.usefixtures("blank_figures")
def test_names_do_not_end_the_script():
    names = tuple(f"</script><b>{index}" for index in range(9))
    result = example([[0.5, 0.5, 0.2, 0.2]], [1], (192, 192), names)
    page = render_page(np.zeros((192, 192, 3), np.uint8), result, {}, explanation_of(result))
    assert page_data(page)["configurations"][0]["objects"][0]["name"] == "#0 </script><b>1"
    assert "<b>1" not in page.replace("\\u003cb>1", "")


def test_pages_stay_light(monkeypatch):
    explanation = explanation_of(RESULT, heads=True)
    full = page_maps(explanation, RESULT, MapStyle(), range(9))
    assert [channel["name"] for channel in full["channels"]] == [
        "chefer",
        *(f"head {h}" for h in range(8)),
    ]
    monkeypatch.setattr(report_maps, "MOST_BYTES", explanation.maps.numel() // 3)
    light = page_maps(explanation, RESULT, MapStyle(), range(9))
    assert len(light["channels"]) == 1 and len(light["configurations"]) == 3
    assert light["frames"] == [0, 1, 2, *[None] * 6]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not here")
@pytest.mark.parametrize("script", ["relevance.js", "sweep.js"])
def test_scripts_are_well_formed(script, tmp_path):
    path = tmp_path / script
    path.write_text((resources.files("headoff.report") / "templates" / script).read_text())
    subprocess.run(["node", "--check", str(path)], check=True)


# Words and files


def test_evidence_in_words():
    told = evidence(EXPLANATION)
    assert re.search(r"With none off \d+% of the relevance after layer 5 is within their boxes", told)
    assert told.endswith("No image evidence at all: first 8 off.")
    assert headline(RESULT, EXPLANATION).startswith(f"{OBJECTS} objects with none off.")


@pytest.mark.usefixtures("blank_figures")
def test_a_report_with_maps_and_then_without(tmp_path):
    configurations = headoff.cumulative(2)
    image, result = scene_example(configurations=configurations)
    explanation = explanation_of(result, layers=2)
    write_report(
        tmp_path, image, result, provenance={"image": "scene"}, figures="all", explanation=explanation
    )
    with open(tmp_path / "relevance.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * OBJECTS * 2
    assert rows[-1]["status"] == "no image evidence" and rows[-1]["peak_x"] == "" and rows[-1]["mass"] == "0"
    assert float(rows[0]["mass"]) == pytest.approx(float(explanation.masses[0, 0, 0]), rel=1e-5)
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["relevance"]["method"] == "chefer"
    assert all((tmp_path / file).is_file() for file in written["files"])
    assert "figures/relevance-02-first-2-off.png" in written["files"]
    again = load_explanation(tmp_path / "maps.npz")
    assert torch.equal(again.maps, explanation.maps) and again.axes == explanation.axes
    assert not [path for path in tmp_path.rglob(".*")]
    write_report(tmp_path, image, result, provenance={})
    assert not (tmp_path / "maps.npz").exists() and not (tmp_path / "relevance.csv").exists()
    assert not list((tmp_path / "figures").glob("relevance*"))


def test_an_explanation_of_something_else_is_rejected(tmp_path):
    other = replace(EXPLANATION, configurations=EXPLANATION.configurations[::-1])
    with pytest.raises(SettingError, match="other configurations"):
        write_report(tmp_path / "out", IMAGE, RESULT, provenance={}, explanation=other)
    assert not (tmp_path / "out").exists()


def test_of_many_objects_the_best_are_drawn():
    """Six to a figure; figures of a hundred objects would take minutes."""
    image, result = crowd(40, (60, 80), configurations=[none_off()])
    figures = list(
        relevance_figures(image, explanation_of(result), style=MapStyle(), baseline=result.baseline)
    )
    assert MOST_OBJECTS == 24
    assert [figure.stem.partition("-objects-")[2] for figure in figures] == ["0-5", "6-11", "12-17", "18-23"]
