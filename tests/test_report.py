import csv
import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image
from sweep_examples import crowd, scene_example

import headoff.report.output as output
from headoff.errors import OutputError, SettingError
from headoff.figures.survival import survival_chart
from headoff.gates import all_subsets, cumulative, heads_off, none_off, parse_configuration, single_heads
from headoff.outcomes import Status
from headoff.report import SCHEMA_VERSION, folder_index, is_finished, verdict, write_report
from headoff.report.page import render_page
from headoff.report.story import sentences
from headoff.versions import versions

PROVENANCE = {"image": "a <b> & c.png", "model": "scenes", "command": "headoff sweep 'a <b> & c.png'"}
VOID = {"meta", "img", "input", "source", "br", "link"}


class Reader(HTMLParser):
    """Checks that elements are nested, and collects what refers to something."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.ids, self.images_without_alt = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [v for k, v in attributes.items() if k in ("src", "href", "srcset", "xlink:href")]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.images_without_alt += tag == "img" and "alt" not in attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    image, result = scene_example(configurations=cumulative(3))
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    page = write_report(folder, image, result, provenance=PROVENANCE, figures="all")
    return folder, page, result


def test_everything_is_written(written):
    folder, page, _ = written
    assert page == folder / "index.html"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= {"detections.csv", "objects.csv", "sweep.json", "index.html", "thumbnail.webp"}
    assert files >= {f"figures/{name}.png" for name in ("00-none-off", "survival", "outcomes")}
    assert not [file for file in files if file.endswith(".part")]
    assert is_finished(folder)
    for file in files:
        if file.endswith(".png"):
            Image.open(folder / file).load()


def test_json_says_what_the_result_says(written):
    folder, _, result = written
    contents = json.loads((folder / "sweep.json").read_text())
    assert (contents["schema"], contents["schema_version"]) == ("headoff.sweep", SCHEMA_VERSION)
    assert contents["provenance"] == PROVENANCE
    assert contents["verdict"] == verdict(result)
    for key, value in json.loads(json.dumps(result.as_dict())).items():
        assert contents[key] == value
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(contents["files"]) == there - {"sweep.json"}


def test_csv_has_a_row_for_each(written):
    folder, _, result = written
    with open(folder / "detections.csv", newline="") as file:
        detections = [*csv.DictReader(file)]
    with open(folder / "objects.csv", newline="") as file:
        objects = [*csv.DictReader(file)]
    assert len(detections) == sum(map(len, result.detections))
    assert len(objects) == len(result) * len(result.baseline)
    nothing = [row for row in detections if row["status"] == "unmatched"]
    assert len(nothing) == sum(len(outcome.unmatched) for outcome in result.outcomes)
    assert all(row["object"] == "" for row in nothing)
    duplicates = [row for row in detections if row["status"] == "duplicate"]
    assert len(duplicates) == sum(outcome.duplicates for outcome in result.outcomes) > 0
    assert detections[0]["image"] == objects[0]["image"] == PROVENANCE["image"]
    last = result.outcomes[-1].outcomes[0]
    row = next(r for r in objects if r["configuration"] == "first 3 off" and r["object"] == "0")
    assert (row["status"], float(row["query_score"])) == (
        last.status,
        pytest.approx(last.query_score, rel=1e-5),
    )


def test_the_page_stands_alone(written):
    _, page, result = written
    html = page.read_text()
    reader = read(html)
    assert all(ref.startswith(("#", "data:")) for ref in reader.references)
    assert not re.search(r"https?:|//\w+\.\w+/|@import|url\((?!data:|#)", html)
    assert len(reader.ids) == len(set(reader.ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(reader.ids)
    assert reader.images_without_alt == 0
    assert "a &lt;b&gt; &amp; c.png" in html and "a <b>" not in html
    assert html.count("<article") == len(result)
    assert len(html) < 1_000_000


@pytest.mark.parametrize("objects", [0, 1])
def test_the_page_of_none_and_one(objects):
    image, result = crowd(objects, (30, 40), ("<script>",), configurations=[heads_off(3)])
    html = render_page(image, result, {})
    read(html)
    assert html.count("<script>") == 1
    assert ("No object with none off" in html) == (objects == 0)


def test_equal_results_make_equal_pages():
    image, result = crowd(1, (30, 40), configurations=[heads_off(3)])
    assert render_page(image, result, {}) == render_page(image, result, {})


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(
    ("figures", "files"),
    [("none", {"sweep.json"}), ("page", {"sweep.json", "index.html", "thumbnail.webp"})],
)
def test_figures_that_are_left_out(tmp_path, figures, files):
    image, result = crowd(1, (30, 40), configurations=[heads_off(3)])
    page = write_report(tmp_path, image, result, provenance={}, figures=figures)
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written == files | {"detections.csv", "objects.csv"} and page.is_file()
    assert folder_index(tmp_path.parent, [tmp_path]).is_file()


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize(("format", "magic"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
def test_formats_of_figures(tmp_path, format, magic):
    image, result = crowd(1, (30, 40), configurations=[heads_off(3)])
    write_report(tmp_path, image, result, provenance={}, figures="all", format=format, dpi=50)
    chart = tmp_path / "figures" / f"survival.{format}"
    assert chart.read_bytes().startswith(magic)
    assert format != "png" or Image.open(chart).width < 500
    with pytest.raises(SettingError, match="png, svg, pdf"):
        write_report(tmp_path, image, result, provenance={}, format="jpg")


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_without_provenance_the_image_and_versions_are_named(tmp_path):
    image, result = crowd(1, (30, 40), configurations=[heads_off(3)])
    image.save(tmp_path / "street.png")
    write_report(tmp_path / "out", tmp_path / "street.png", result, figures="none")
    made_with = json.loads((tmp_path / "out" / "sweep.json").read_text())["provenance"]
    assert made_with == {"image": "street.png", **versions()} and {"headoff", "torch"} < set(made_with)


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_error_leaves_the_earlier_report(tmp_path, monkeypatch, error):
    image, result = crowd(1, (30, 40), configurations=[heads_off(3)])
    write_report(tmp_path, image, result, provenance=PROVENANCE)
    before = contents(tmp_path)

    def fails(*_):
        raise error

    monkeypatch.setattr(output, "render_page", fails)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        write_report(tmp_path, image, result, provenance={"image": "other.jpg"})
    assert contents(tmp_path) == before and is_finished(tmp_path)


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("failing", range(1, 8))
def test_files_of_two_reports_never_mix(tmp_path, monkeypatch, failing):
    image, result = crowd(1, (30, 40), configurations=[heads_off(3)])
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, name in ((old, "old.jpg"), (new, "new.jpg")):
        write_report(
            folder, image, result, provenance={"image": name}, figures="all" if folder == old else "page"
        )
    moves, replace = [], output.os.replace

    def interrupted(source, target):
        moves.append(target.name)
        if len(moves) == failing:
            raise KeyboardInterrupt
        replace(source, target)

    before, wanted = contents(old), contents(new)
    with monkeypatch.context() as patching:
        patching.setattr(output.os, "replace", interrupted)
        try:
            write_report(old, image, result, provenance={"image": "new.jpg"})
            assert len(moves) < failing and moves[-1] == "sweep.json"
        except KeyboardInterrupt:
            left = {name: data for name, data in contents(old).items() if name != ".unfinished.json"}
            assert left == before or left.items() <= wanted.items()
            assert is_finished(old) == (left == before)
    write_report(old, image, result, provenance={"image": "new.jpg"})
    assert contents(old) == wanted


@pytest.mark.usefixtures("blank_figures")
def test_a_second_writer_is_told(tmp_path):
    image, result = crowd(0, (30, 40), configurations=[heads_off(3)])
    program = (
        "import sys; from headoff.files import lock; from pathlib import Path\n"
        "with lock(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(OutputError, match=f"process {other.pid} is writing to"):
        write_report(tmp_path, image, result, provenance={})
    other.kill()
    other.communicate()
    write_report(tmp_path, image, result, provenance={})
    assert is_finished(tmp_path)


@pytest.mark.usefixtures("blank_figures")
def test_writing_again_removes_what_is_stale_and_nothing_else(tmp_path):
    image, result = crowd(1, (30, 40), configurations=[heads_off(3)])
    write_report(tmp_path, image, result, provenance={}, figures="all")
    (tmp_path / "figures" / "mine.png").write_bytes(b"")
    assert (tmp_path / "figures" / "00-h3-off.png").exists()
    write_report(tmp_path, image, result, provenance={})
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["mine.png"]


@pytest.mark.usefixtures("blank_figures")
def test_a_manipulated_list_of_files_deletes_nothing_outside(tmp_path):
    image, result = crowd(0, (30, 40), configurations=[heads_off(3)])
    outside = tmp_path / "precious"
    outside.write_text("")
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({"files": ["../precious", str(outside), 3, ""]}))
    write_report(folder, image, result, provenance={})
    assert outside.exists()


@pytest.mark.usefixtures("blank_figures")
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    image, result = crowd(0, (30, 40), configurations=[heads_off(3)])
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError) as caught:
        write_report(blocked / "folder", image, result, provenance={})
    message = str(caught.value)
    assert "file" in message and "\n" not in message and not message.endswith(".")


def lost_at(*ks, objects=None):
    """A cumulative result where object i is lost from ks[i] heads off on (None: never)."""
    _, result = crowd(len(ks), (60, 80), ("dog",))
    kept = result.outcomes[0].outcomes
    outcomes = []
    for k in range(9):
        each = [
            dataclasses.replace(one, status=Status.LOST, detections=()) if at is not None and k >= at else one
            for one, at in zip(kept, ks, strict=True)
        ]
        outcomes.append(dataclasses.replace(result.outcomes[0], outcomes=tuple(each)))
    return dataclasses.replace(result, outcomes=tuple(outcomes))


@pytest.mark.parametrize(
    ("ks", "said"),
    [
        ((3, 8), "2 objects with none off. First lost at 3 heads off: #0 dog. All gone at 8."),
        ((2, 2), "2 objects with none off. All are lost at 2 heads off."),
        ((1,), "1 object with none off. It is lost at 1 head off."),
        ((None, None), "2 objects with none off. None is lost, even with all 8 heads off."),
        ((), "No object with none off. Nothing is found under any other configuration either."),
        (
            (None, 4),
            "2 objects with none off. First lost at 4 heads off: #1 dog. "
            "With all 8 heads off: 1 kept, 1 lost.",
        ),
    ],
)
def test_verdict_of_a_cumulative_sweep(ks, said):
    assert verdict(lost_at(*ks)) == said


def test_verdict_of_other_configurations():
    _, result = scene_example(configurations=[heads_off(1), heads_off(2), heads_off(3)])
    assert (
        verdict(result)
        == "5 objects with none off. 1 of 3 configurations lose at least one; 'H3 off' loses 3."
    )


def losing(configurations, lost):
    """Two objects, of which those of `lost[text]` are lost under the configuration of that text; no score changes."""
    _, result = crowd(2, (60, 80), ("dog",), configurations=configurations)
    outcomes = []
    for configuration in configurations:
        missing = lost.get(configuration.text, ())
        each = [
            dataclasses.replace(one, status=Status.LOST, detections=()) if one.object in missing else one
            for one in result.outcomes[0].outcomes
        ]
        outcomes.append(dataclasses.replace(result.outcomes[0], outcomes=tuple(each)))
    return dataclasses.replace(result, outcomes=tuple(outcomes))


@pytest.mark.parametrize(
    ("configurations", "lost", "said"),
    [
        (
            (none_off(), *single_heads()),
            {"L5H6": (0, 1), "L4H2": (1,)},
            "Of 48 heads switched off one at a time, 2 lose an object; L5H6 off loses 2 (#0 dog and #1 dog).",
        ),
        (
            single_heads(2, 3, site="decoder_self"),
            {"decoder_self L1H2": (1,)},
            "Of 6 heads (decoder_self) switched off one at a time, 1 loses an object; L1H2 off loses 1 (#1 dog).",
        ),
        (
            single_heads(),
            {},
            "Of 48 heads switched off one at a time, none loses an object or lowers a probability by 0.01.",
        ),
        (
            all_subsets(3),
            {"H2": (1,), "H0+2": (0, 1), "H1-2": (1,), "H0-2": (0, 1)},
            "4 of 8 subsets of 3 heads can be off with every object found: up to 2 heads (H0-1). "
            "H2 off is enough to miss 1.",
        ),
        (all_subsets(2), {}, "All 4 subsets of 2 heads can be off with every object found."),
    ],
)
def test_verdict_names_heads(configurations, lost, said):
    lost = {parse_configuration(text).text: objects for text, objects in lost.items()}
    assert verdict(losing(configurations, lost)) == f"2 objects with none off. {said}"


def test_verdict_of_single_heads_that_lose_nothing_names_the_largest_fall():
    _, result = crowd(1, (60, 80), ("dog",), configurations=single_heads(1, 3))
    low = dataclasses.replace(result.outcomes[0].outcomes[0], query_score=0.61)
    outcomes = (
        result.outcomes[0],
        dataclasses.replace(result.outcomes[0], outcomes=(low,)),
        result.outcomes[0],
    )
    assert verdict(dataclasses.replace(result, outcomes=outcomes)) == (
        "1 object with none off. Of 3 heads switched off one at a time, none loses an object; "
        f"L0H1 off lowers #0 dog most, from {result.baseline[0].score:.2f} to 0.61."
    )


def test_verdict_of_single_heads_that_lose_nothing_names_what_changes_most():
    """A moved object matters more than any probability."""
    _, result = crowd(2, (60, 80), ("dog",), configurations=single_heads(1, 3))
    kept = result.outcomes[0]
    low = dataclasses.replace(kept.outcomes[0], query_score=0.01)
    moved = dataclasses.replace(kept.outcomes[1], status=Status.MOVED)
    outcomes = (
        dataclasses.replace(kept, outcomes=(low, kept.outcomes[1])),
        kept,
        dataclasses.replace(kept, outcomes=(kept.outcomes[0], moved)),
    )
    assert verdict(dataclasses.replace(result, outcomes=outcomes)) == (
        "2 objects with none off. Of 3 heads switched off one at a time, none loses an object; "
        "L0H2 off changes most: 1 moved (#1 dog)."
    )


@pytest.mark.parametrize("configurations", [single_heads(), all_subsets(3), [heads_off(1)]])
def test_the_page_has_the_charts_of_its_sweep(configurations):
    image, result = crowd(3, (30, 40), configurations=configurations)
    html = render_page(image, result, {})
    read(html)
    assert html.count("<svg") == (4 if len(configurations) == 48 else 2)
    assert survival_chart(result).caption in html.replace("&#39;", "'")


def test_sentences_name_every_object_once():
    _, result = crowd(12, (60, 80))
    for detections, outcome in zip(result.detections, result.outcomes, strict=True):
        told = " ".join(sentences(result.baseline, detections, outcome))
        if told.startswith("All"):
            continue
        assert all(len(re.findall(rf"#{index}\b", told)) == 1 for index in range(12))


def test_folder_index(tmp_path):
    image, result = crowd(1, (30, 40), ("dog",), configurations=[heads_off(3)])
    for name in ("one #1", "two", "three"):
        write_report(tmp_path / name, image, result, provenance={"image": f"{name}.jpg"})
    links = r'rel="(\w+)" href="([^"]+)"'
    page = folder_index(
        tmp_path, [tmp_path / "one #1", tmp_path / "two"], failures={"bad.jpg": "it is <empty>"}
    )
    html = page.read_text()
    reader = read(html)
    assert [r for r in reader.references if r.endswith("html")] == ["one%20%231/index.html", "two/index.html"]
    assert html.count(verdict(result)) == 2
    one, two = ((tmp_path / name / "index.html").read_text() for name in ("one #1", "two"))
    assert re.findall(links, one) == [("index", "../index.html"), ("next", "../two/index.html")]
    assert re.findall(links, two) == [("index", "../index.html"), ("prev", "../one%20%231/index.html")]
    folder_index(tmp_path, [tmp_path / "three", tmp_path / "two"])
    assert re.findall(links, (tmp_path / "two" / "index.html").read_text())[1:] == [
        ("prev", "../three/index.html")
    ]
    assert "one #1.jpg" in html and "it is &lt;empty&gt;" in html
    with pytest.raises(OutputError, match="no finished results"):
        folder_index(tmp_path, [tmp_path / "four"])


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("figures", ["none", "page", "all"])
def test_progress_counts_all_that_is_drawn(tmp_path, figures):
    picture, result = crowd(2, (60, 80), configurations=[none_off(), heads_off(1)])
    seen = []
    write_report(
        tmp_path, picture, result, provenance={}, figures=figures, progress=lambda *at: seen.append(at)
    )
    total = len(list(tmp_path.glob("figures/*"))) + (figures != "none")
    assert seen == [(done, total) for done in range(total + 1)]
