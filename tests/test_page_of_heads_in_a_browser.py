"""The page of what heads contribute, in headless Chromium."""

import pytest
from importance_examples import importance_of
from PIL import Image
from test_page_in_a_browser import CHROMIUM, seen_in

import headoff
from headoff.figures.importance import decimals_of, score_text
from headoff.importance import HeadCards, aggregate
from headoff.report import write_heads_report
from headoff.report.heads import heads_index

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

LOOK = """
const texts = (row) => [...row.querySelectorAll("button")].map((cell) => cell.textContent);
const matrix = () => all("#matrix tbody tr").map(texts);
const blank = ({ width, height }) => painted(Object.assign(document.createElement("canvas"), { width, height }));
const chosen = () => all('#matrix [aria-selected="true"] button').map((cell) => cell.getAttribute("aria-label"));
const pressed = (key, on) => on.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const choose_head = (head) => page.set({ head });
const cell = (layer, head) => all("#matrix tbody tr")[layer].querySelectorAll("button")[head];
"""


def texts(found, object=None):
    """What the matrix of `scores` shows for an object, or the mean."""
    scores = found.scores.mean(0) if object is None else found.scores[object]
    decimals = decimals_of(float(found.scores.abs().max()))
    return [[score_text(score, decimals) for score in row] for row in scores.tolist()]


def test_choices_change_the_matrix_and_the_address(tmp_path):
    importance = importance_of()
    write_heads_report(tmp_path, Image.new("RGB", (80, 60)), importance, provenance={})
    page = (tmp_path / "index.html").read_text()
    script = (
        LOOK
        + """
        seen.first = matrix();
        choose("object", "1");
        seen.object = matrix();
        choose("measure", "shapley");
        choose("ablation", "uniform");
        seen.other = matrix();
        seen.unclear = all("#matrix .unclear").length;
        cell(2, 3).click();
        seen.clicked = [chosen(), $("card-title").textContent];
        pressed("ArrowLeft", cell(2, 3));
        pressed("ArrowUp", cell(2, 2));
        seen.moved = $("card-title").textContent;
        seen.focused = document.activeElement.getAttribute("aria-label");
        pressed("ArrowRight", document.body);
        pressed("ArrowDown", document.body);
        seen.elsewhere = $("card-title").textContent;
        seen.address = location.hash;
        seen.points = all("#kinds g").length;
        seen.here = all("#kinds .here title").map((title) => title.textContent);
        all("#kinds g")[5].dispatchEvent(new MouseEvent("click", { bubbles: true }));
        seen.pointed = $("card-title").textContent;
        choose_head("L1H3");
        seen.numbers = all("#numbers tbody tr").map((row) => [...row.children].map((one) => one.textContent));
        choose("measure", "shapley_columns");
        seen.columns = [matrix(), $("card-title").textContent];
        choose("value", "duplicates");
        choose("measure", "gradient");
        seen.nothing = $("matrix").textContent;
        all("#bars button")[2].click();
        seen.bar = [$("measure").value, $("card-title").textContent];
        """
    )
    seen, errors = seen_in(tmp_path, page, script)
    assert errors == []
    shapley = importance.get("shapley", "probability", "uniform")
    assert seen["first"] == texts(importance.get("removal")) and seen["object"] == texts(
        importance.get("removal"), 1
    )
    assert seen["other"] == texts(shapley, 1)
    assert seen["unclear"] == int((shapley.scores[1].abs() <= 1.96 * shapley.errors[1]).sum())
    assert len(seen["clicked"][0]) == 1 and seen["clicked"][0][0].startswith("Layer 2, head 3: ")
    assert seen["clicked"][1] == "Layer 2, head 3" and seen["moved"] == "Layer 1, head 2"
    assert seen["focused"].startswith("Layer 1, head 2") and seen["elsewhere"] == "Layer 1, head 3"
    for part in ("object=1", "measure=shapley", "ablation=uniform", "head=L1H3"):
        assert part in seen["address"]
    under = [importance.get("shapley", "probability", kind) for kind in ("zero", "uniform")]
    decimals = decimals_of(max(float(found.scores.abs().max()) for found in under))
    zero, uniform = (score_text(float(found.scores[1, 1, 3]), decimals) for found in under)
    assert seen["points"] == 12 and seen["pointed"] == "Layer 1, head 1"
    assert seen["here"] == [f"Layer 1, head 3: {zero} under zero, {uniform} under uniform"]
    numbers = {row[0]: row[1:] for row in seen["numbers"]}
    assert numbers["shapley"][0] == texts(shapley, 1)[1][3]
    assert numbers["gradient"][1:] == ["–", "–"] and "shapley_columns (all layers)" in numbers
    assert seen["columns"] == [
        texts(importance.get("shapley_columns", "probability", "uniform"), 1),
        "Head 3 in all layers",
    ]
    assert seen["nothing"] == "This measure does not score this value."
    assert seen["bar"] == ["shapley_columns", "Head 2 in all layers"]


def test_an_address_shows_the_same_and_a_wrong_one_the_default(tmp_path):
    importance = importance_of()
    write_heads_report(tmp_path, Image.new("RGB", (80, 60)), importance, provenance={})
    page = (tmp_path / "index.html").read_text()
    look = LOOK + 'seen.state = [$("object").value, $("measure").value, $("card-title").textContent];'
    good = "#object=2&measure=shapley&value=duplicates&head=L1H0"
    assert seen_in(tmp_path, page, look, good)[0]["state"] == ["2", "shapley", "Layer 1, head 0"]
    seen, errors = seen_in(tmp_path, page, look, "#object=9&measure=x&head=L7H0&nothing=1")
    assert seen["state"][:2] == ["mean", "removal"] and errors == []


def test_the_card_of_a_head_shows_what_is_lost_without_it(tmp_path):
    detector, image = headoff.load("scenes"), headoff.sample_image(0)
    importance = headoff.heads(detector, image, measures="removal", values="probability", ablations="uniform")
    cards = HeadCards.of(detector, image, importance)
    write_heads_report(tmp_path, image, importance, provenance={}, cards=cards)
    script = (
        LOOK
        + """
        cell(0, 4).click();
        seen.told = all("#told li").map((line) => line.textContent);
        seen.boxes = all("#picture .mark").map((mark) => [mark.className, mark.textContent]);
        seen.looks = all("#looks figcaption").length;
        seen.empty = all("#looks canvas").filter((canvas) => painted(canvas) === blank(canvas)).length;
        choose("none");
        seen.none = all("#picture .mark").length;
        seen.wide = document.documentElement.scrollWidth <= window.innerWidth;
        """
    )
    page = (tmp_path / "index.html").read_text()
    for size in ("1400,1000", "500,900", "2000,1200"):
        seen, errors = seen_in(tmp_path, page, script, size=size)
        assert errors == [] and seen["wide"], size
    outcome = cards.sweeps["uniform"].outcomes[cards.index(4, 0)]
    lost = [found.object for found in outcome.outcomes if found.status == "lost"]
    assert lost == [2]
    assert "Lost: #2 crescent." in seen["told"] and ["mark was", "#2 crescent lost"] in seen["boxes"]
    after = outcome.outcomes[2].query_score
    assert (
        f"#2 crescent: probability at its query {importance.objects[2].score:.2f} → {after:.2f}"
        in seen["told"]
    )
    assert seen["looks"] == 4 and seen["empty"] == 0 and seen["none"] == 4


def test_the_page_of_several_images(tmp_path):
    found = [importance_of(2, seed=seed) for seed in range(5)]
    for seed, importance in enumerate(found):
        write_heads_report(tmp_path / f"{seed}.png", Image.new("RGB", (80, 60)), importance, provenance={})
    heads_index(tmp_path, [tmp_path / f"{seed}.png" for seed in range(5)])
    (tmp_path / "here").mkdir()
    script = LOOK + 'seen.pages = all("#pages a").map((link) => link.textContent);'
    linked, errors = seen_in(tmp_path / "here", (tmp_path / "1.png" / "index.html").read_text(), script)
    assert errors == [] and linked["pages"] == ["← 0.png", "all images", "2.png →"]
    script = LOOK + 'seen.unclear = all("#matrix .unclear").length; seen.spoken = cell(1, 1).title;'
    seen, errors = seen_in(tmp_path, (tmp_path / "index.html").read_text(), script)
    scores = next(iter(aggregate(found).scores.values()))
    assert errors == [] and seen["unclear"] == int(scores.spans_zero.sum())
    assert "95% interval" in seen["spoken"]
