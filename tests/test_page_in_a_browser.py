"""The page of a report in headless Chromium: every control does what it says, and nothing is logged as an error.

A script at the end of the page uses the controls as a reader does and leaves what it sees in the document, which
Chromium prints. So no driver is needed.
"""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from explanation_examples import explanation_of
from matplotlib.figure import Figure
from sweep_examples import crowd, scene_example

from headoff.figures.palette import STATUS_STYLES
from headoff.gates import all_subsets
from headoff.report.charts import Chart, charts_page
from headoff.report.page import render_page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

TOOLS = """
const $ = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const seen = {};
// As a reader changes a slider, a list, or a check box.
function choose(id, value) {
  const control = $(id);
  if (control.type === "checkbox") control.click();
  else {
    control.value = value;
    for (const kind of ["input", "change"]) control.dispatchEvent(new Event(kind, { bubbles: true }));
  }
}
const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const painted = (canvas) => canvas.toDataURL();
const shown = () => all(".frame").filter((frame) => frame.offsetWidth).map((frame) => frame.dataset.title);
const drawn = () => new Promise((done) => setTimeout(done, 500));
"""


def with_script(page, script):
    """The page, with a script at its end that leaves what it sees in the document."""
    end = f"""<script type="module">{TOOLS}
await drawn();
try {{ {script} }} catch (error) {{ seen.failed = String(error.stack); }}
const result = document.createElement("pre");
result.id = "seen";
result.textContent = JSON.stringify(seen);
document.body.append(result);
</script></body>"""
    return page.replace("</body>", end)


def seen_in(tmp_path, page, script, address="", size="1400,1000"):
    """What `script` (JavaScript) leaves in `seen`, and the console's errors."""
    path = tmp_path / "index.html"
    path.write_text(with_script(page, script))
    return seen_at(tmp_path, f"{path.as_uri()}{address}", size)


def seen_at(tmp_path, address, size="1400,1000"):
    """The same of a page that has its script."""
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",  # root in a container has none
            "--disable-gpu",
            "--enable-logging=stderr",
            "--virtual-time-budget=20000",
            f"--window-size={size}",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            address,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert "failed" not in seen, seen
    return seen, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page():
    image, result = scene_example()
    return render_page(image, result, {"image": "scene.png"}, explanation_of(result, heads=True))


def test_every_control_of_the_page(page, tmp_path):
    seen, errors = seen_in(
        tmp_path,
        page,
        """
        seen.first = shown();
        seen.cards = all(".card").length;
        seen.last = document.querySelector(".card .caption").textContent;
        $("next").click();
        choose("slider", 3);
        seen.stepped = [shown(), location.hash];
        press("ArrowLeft");
        seen.pressed = shown();

        const large = document.querySelector(".card > .map canvas");
        const before = painted(large);
        choose("layer", 1);
        const caption = document.querySelector(".card .caption");
        const sliders = all(".card > input").map((input) => input.value);
        seen.layer = [painted(large) !== before, sliders, caption.textContent];
        const cells = large.width;
        choose("smooth");
        seen.smooth = large.width / cells;
        choose("map", 4);
        seen.heads = [painted(large) !== before, caption.textContent];
        choose("map", 0);
        choose("scale", "sweep");
        seen.ramp = $("ramp-to").textContent;

        seen.without = all(".picture > .map").length;
        choose("object", 1);
        seen.onPicture = all(".picture > .map").filter((map) => map.offsetWidth).length;
        choose("all");
        seen.all = [shown().length, all(".picture > .map").filter((map) => map.offsetWidth).length];
        all(".tile")[2].click();
        seen.tile = $("layer").value;
        choose("boxes");
        seen.boxes = all(".mark").filter((mark) => mark.offsetWidth).length;
        seen.hash = location.hash;
        """,
    )
    assert errors == []
    assert seen["first"] == ["none off"] and seen["cards"] == 5
    assert seen["last"].startswith("relevance after layer 5: mass")
    assert seen["stepped"] == [["first 3 off"], "#step=3"] and seen["pressed"] == ["first 2 off"]
    changed, sliders, caption = seen["layer"]
    assert changed and set(sliders) == {"1"} and caption.startswith("relevance after layer 1: mass")
    assert seen["smooth"] == 8
    assert seen["heads"][0] and seen["heads"][1].startswith("attention, head 3 of layer 1")
    assert "of any object" in seen["ramp"]
    assert (seen["without"], seen["onPicture"], seen["all"]) == (0, 1, [9, 9])
    assert seen["tile"] == "2" and seen["boxes"] == 0
    chosen = {"step=2", "all=1", "boxes=0", "object=1", "layer=2", "scale=sweep", "smooth=1"}
    assert set(seen["hash"][1:].split("&")) == chosen


def test_maps_of_several_methods(tmp_path):
    image, result = scene_example()
    first = explanation_of(result, heads=True)
    signed = replace(first, maps=-10 * first.maps, method="attn_lrp", heads=None)
    signed.maps[:, :, :, 0, 0] = 50.0
    page = render_page(image, result, {}, first, others=[replace(first, method="raw", heads=None), signed])
    seen, errors = seen_in(
        tmp_path,
        page,
        """
        const caption = () => document.querySelector(".card .caption").textContent;
        const large = document.querySelector(".card > .map canvas");
        seen.methods = all(".card")[0].querySelectorAll(".compared .tile").length;
        seen.first = [caption(), painted(large)];
        choose("map", 1);
        seen.second = [caption(), painted(large)];
        all(".card")[0].querySelectorAll(".compared .tile")[2].click();
        all(".card")[0].querySelectorAll(".tiles:not(.compared):not(.heads) .tile")[1].click();
        seen.signed = [caption(), location.hash, $("ramp-to").textContent];
        const colours = large.getContext("2d").getImageData(0, 0, 6, 6).data;
        const cells = [...Array(35).keys()].map((cell) => colours.slice(4 * cell + 4, 4 * cell + 8).join());
        seen.negative = new Set(cells).size;
        choose("map", 4);
        seen.head = caption();
        """,
    )
    assert errors == []
    assert seen["methods"] == 3 and seen["first"][0].startswith("chefer after layer 5: mass")
    assert seen["second"][0].startswith("raw after layer 5: mass") and seen["second"][1] == seen["first"][1]
    assert seen["signed"][0].startswith("attn_lrp after layer 1: mass") and "map=2" in seen["signed"][1]
    assert seen["negative"] == 1, "all negative relevance has the colour of 0"
    assert seen["head"].startswith("attention, head 1 of layer 1")


def test_an_address_shows_the_same_on_a_telephone(page, tmp_path):
    # As `folder_index` links a page with the others of its folder.
    links = '<link rel="index" href="../index.html" title="all images"><link rel="next" href="../b/" title="b.png">'
    seen, errors = seen_in(
        tmp_path,
        page.replace("<!--pages-->", f"<!--pages-->{links}"),
        """
        seen.links = all("#pages a").map((link) => [link.getAttribute("href"), link.textContent]);
        seen.shown = shown();
        seen.layer = $("layer-now").textContent;
        seen.object = $("object").value;
        seen.map = document.querySelector(".card .caption").textContent;
        const room = document.documentElement.clientWidth;
        seen.wide = all("main *").filter((element) => !element.closest(".scroll, .mark"))
          .filter((element) => element.getBoundingClientRect().right > room + 1)
          .map((element) => element.outerHTML.slice(0, 80));
        """,
        address="#step=4&object=2&layer=3&map=6&nonsense=1&scale=wrong",
        size="400,900",
    )
    assert errors == []
    assert seen == {
        "links": [["../index.html", "all images"], ["../b/", "b.png →"]],
        "shown": ["first 4 off"],
        "layer": "3",
        "object": "2",
        "map": seen["map"],
        "wide": [],
    }
    assert seen["map"].startswith("attention, head 5 of layer 3")


@pytest.mark.parametrize("size", ["400,900", "1400,900"])
def test_tables_of_many_objects_are_not_cut(size, tmp_path):
    seen, _ = seen_in(
        tmp_path,
        render_page(*crowd(40, (60, 80)), {}),
        """
        const edge = (element) => element.getBoundingClientRect().right;
        seen.tables = all("table.outcomes").length;
        seen.outside = all("table.outcomes :is(th, td)")
          .filter((cell) => edge(cell) > edge(cell.closest("table")) + 1).length;
        seen.cut = all("table.outcomes thead .number").filter((cell) => cell.scrollWidth > cell.clientWidth + 1)
          .map((cell) => cell.textContent);
        """,
        size=size,
    )
    assert seen == {"tables": 2, "outside": 0, "cut": []}


def test_charts_are_whole_on_a_wide_screen(tmp_path):
    figure = Figure(figsize=(12.3, 3))
    figure.add_subplot()
    page = charts_page("Title", "Verdict.", [], [Chart("a", "A chart", figure)], provenance={}, files=[])
    script = "seen.cut = all('.scroll').filter((room) => room.scrollWidth > room.clientWidth + 1).length;"
    seen, _ = seen_in(tmp_path, page, script)
    assert seen == {"cut": 0}


def test_a_switch_for_each_head_shows_every_subset_and_says_what_is_next(tmp_path):
    image, result = scene_example(configurations=all_subsets(5))
    letters = [[STATUS_STYLES[found.status].letter for found in one.outcomes] for one in result.outcomes]
    survival = result.survival().T.tolist()
    page = render_page(image, result, {})
    assert "How many heads can go" not in page  # which is for orders by importance
    links = '<link rel="next" href="../b/" title="b.png">'
    seen, errors = seen_in(
        tmp_path,
        page.replace("<!--pages-->", f"<!--pages-->{links}"),
        """
        seen.stepper = [$("slider"), $("previous")].filter(Boolean).length;
        const switches = all("#board [role=switch]");
        const on = () => switches.map((one) => one.getAttribute("aria-checked") === "true" ? 1 : 0).join("");
        const cellsOf = (row) => [...row.querySelectorAll("td")].map((cell) => cell.textContent);
        const cells = () => all("#board tbody tr").map(cellsOf);
        const look = () => [shown(), on(), location.hash, cells()];
        seen.first = look();
        switches[2].click();
        seen.clicked = look();
        press("4");
        seen.pressed = look();
        all("#board tbody tr")[1].querySelectorAll("td.next")[2].click();
        seen.cell = look();
        press("-");
        seen.allOff = look();
        press("ArrowLeft");
        seen.stepped = look();
        seen.link = document.querySelector("#pages a").getAttribute("href");
        page.set({ step: 9 });
        press("+");
        seen.allOn = look();
        """,
        address="#step=0",
    )
    assert errors == [] and seen["stepper"] == 0 and seen["link"] == "../b/"
    steps = {"first": 0, "clicked": 4, "pressed": 20, "cell": 16, "allOff": 31, "stepped": 30, "allOn": 0}
    for name, step in steps.items():
        title, on, address, cells = seen[name]
        assert title == [result.configurations[step].name]
        assert on == "".join("0" if step >> head & 1 else "1" for head in range(5))
        assert address == (f"#step={step}" if step else "")
        *objects, duplicates, unmatched = cells
        for o, (now, *after) in enumerate(objects):
            assert now == f"{letters[step][o]} {survival[step][o]:.2f}"
            for head, text in enumerate(after):
                letter, change = text.split()
                then = step ^ 1 << head
                assert letter == letters[then][o]
                by = survival[then][o] - survival[step][o]
                assert float(change.replace("\N{MINUS SIGN}", "-")) == pytest.approx(by, abs=0.0051)
        for counts, (now, *after) in (
            ([one.duplicates for one in result.outcomes], duplicates),
            ([len(one.unmatched) for one in result.outcomes], unmatched),
        ):
            assert int(now) == counts[step]
            for head, text in enumerate(after):
                change = int(text.replace("\N{MINUS SIGN}", "-"))
                assert change == counts[step ^ 1 << head] - counts[step]
