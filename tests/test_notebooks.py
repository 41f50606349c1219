"""Results as notebooks show them, and the notebook of the documentation."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from explanation_examples import explanation_of
from PIL import Image
from sweep_examples import crowd, example, scene_example

from headoff.gates import all_subsets


def shown(result):
    """The HTML of a result, and its picture, which is also what it shows as PNG."""
    html = result._repr_html_()
    (encoded,) = re.findall(r'<img src="data:image/png;base64,([^"]+)"', html)
    assert base64.b64decode(encoded) == result._repr_png_()
    return html, Image.open(io.BytesIO(result._repr_png_()))


def test_a_sweep_shows_a_table_and_its_chart():
    html, picture = shown(scene_example()[1])
    assert html.count("<tr>") == 10 and "first 8 off" in html and "more" not in html
    assert 400 < picture.width <= 1000 and picture.height <= 1000


@pytest.mark.parametrize(
    "result", [crowd(45, configurations=all_subsets(7))[1], example([], [], (60, 80))], ids=["large", "empty"]
)
def test_what_a_notebook_shows_is_never_huge(result):
    html, picture = shown(result)
    assert len(html) < 300_000 and max(picture.size) <= 1000
    assert ("... and 116 rows more" in html) == (len(result) > 12)
    assert "<script" not in html


def test_an_explanation_shows_masses_and_its_last_maps():
    explanation = explanation_of(scene_example()[1])
    html, picture = shown(explanation)
    assert f"after decoder layer {explanation.layers[-1]}" in html and "in its box" in html
    assert max(picture.size) <= 1000 and len(html) < 300_000


TOUR = Path(__file__).parent.parent / "docs" / "tour.ipynb"


def test_the_tour_runs(tmp_path, monkeypatch):
    """In a fresh kernel, from the first cell to the last; what it says of its results is true of them."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv(
        "OMP_NUM_THREADS", "1"
    )  # the bundled model is small: threads would wait for one another
    notebook = nbformat.read(TOUR, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "strip the outputs"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    data = [output.data for output in outputs if output.output_type == "execute_result"]
    assert (
        sum("image/png" in shown for shown in data) == 7 and sum("text/html" in shown for shown in data) == 1
    )
    texts = "\n".join(shown.get("text/plain", "") for shown in data)
    found = re.search(
        r"'heads in their order': (\[.*?\]).*'least important first': (\[.*?\])", texts, re.DOTALL
    )
    in_order, ranked = (json.loads(numbers) for numbers in found.groups())
    assert sum(ranked) >= sum(in_order) and in_order[0] == 4
    assert "torch.Size([2, 1, 20, 9])" in texts
