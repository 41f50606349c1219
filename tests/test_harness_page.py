import dataclasses
import json
import subprocess
import sys
import time
from html.parser import HTMLParser
from typing import get_type_hints

import pytest
from page_examples import BENCHMARKS, benchmark, document, finding, picture, ran

from headoff.errors import OutputError, SettingError
from headoff.harness.finding import PROPERTIES, Finding
from headoff.harness.report import render, render_file, summary, validate
from headoff.harness.report.document import FindingRecord
from headoff.harness.report.failures import PROPERTIES as WORDS
from headoff.harness.report.failures import excess, grouped, places
from headoff.harness.report.html import LEAST_GAP, MOST_CHARACTERS, MOST_PICTURES, Scale
from headoff.wording import format_bytes, format_error, format_ratio, format_seconds, format_times

VERDICTS = ("right", "wrong", "slower", "incomplete")
VOID = {"meta", "img", "input", "link", "br"}


class Reader(HTMLParser):
    """The page as a tree of what matters: checks nesting, collects texts by element, references and ids."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.ids, self.tags, self.folded = [], [], [], [], []
        self.text, self.visible, self.without_alt = "", "", 0

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [
            v for k, v in attributes.items() if k in ("src", "href", "srcset", "action", "data")
        ]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.without_alt += tag == "img" and not attributes.get("alt")
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
            self.folded.append(tag == "details" and "open" not in attributes)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        self.folded.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.text += data
        # A folded element shows its summary only, and that only where no other one around it is folded.
        own = self.open.index("summary") - 1 if "summary" in self.open else None
        hidden = any(folded for place, folded in enumerate(self.folded) if place != own)
        self.visible += "" if hidden else data


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.parametrize("verdict", VERDICTS)
def test_page_is_one_well_formed_file_that_needs_no_other(verdict):
    html = render(document(verdict))
    page = read(html)
    assert html.startswith("<!DOCTYPE html>")
    assert len(set(page.ids)) == len(page.ids)
    assert page.without_alt == 0
    for reference in page.references:
        assert reference.startswith(("data:", "#")), reference
        assert not reference.startswith("#") or reference[1:] in page.ids
    assert not [word for word in ("url(", "@import", "fetch(", "http:", "https:") if word in html]


@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_verdict_comes_first_in_words_and_with_a_symbol(verdict):
    given = document(verdict)
    page = read(render(given))
    word = {"right": "Right", "wrong": "Wrong", "slower": "slower", "incomplete": "No verdict"}[verdict]
    body = page.visible[page.visible.index("against sdpa") :]
    assert body.index(word) < body.index(given["headline"]) < body.index("tests:")
    assert page.tags.index("svg") < page.tags.index("h2" if "h2" in page.tags else "section")


def test_what_comes_after_the_verdict_is_in_order_and_the_rest_is_folded():
    page = read(render(document("wrong")))
    order = [
        "1 note",
        "What is wrong",
        "What it costs",
        "What failed",
        "Suites",
        "skipped, and why",
        "All",
        "Settings",
    ]
    found = [page.visible.index(heading) for heading in order]
    assert found == sorted(found)
    passed = document("wrong")["tests"][0]["id"]
    for hidden in (passed, "Example CPU", "float32 cannot decide this case", "--report report.html"):
        assert hidden in page.text and hidden not in page.visible


def test_reasons_of_skipped_tests_are_counted():
    assert "4 tests: float32 cannot decide this case" in read(render(document())).text


def test_failures_of_one_cause_are_one_entry_with_one_example():
    given = document("wrong")
    page = read(render(given))
    assert page.visible.count("gate at decoder_cross") == 1
    assert "60 tests" in page.visible and "59 more tests with this cause" in page.visible
    failed = [test["id"] for test in given["tests"] if test["outcome"] == "failed"]
    assert sum(name in page.visible for name in failed) == 3
    assert all(name in page.text for name in failed)
    assert "layers 0-5" in page.visible and "heads 0-7" in page.visible


def test_the_example_is_pictured_and_the_order_is_that_of_the_diagnosis():
    first, *others = grouped(validate(document("wrong")))
    assert first.title == "gate at decoder_cross" and first.tests[0]["findings"][0]["pictures"]
    assert first.worst["error"] == max(one["error"] for one in first.findings)
    assert [(one.title, len(one.tests)) for one in others] == [
        ("relevance", 1),
        ("AssertionError: logits differ", 1),
    ]


def test_messages_that_differ_in_numbers_only_are_one_group_and_errors_come_last():
    tests = [ran(0, "error", message="fixture 'x' not found")]
    tests += [ran(n, "failed", message=f"assert {n}.5e-3 < 1 at 0x{n:08x}") for n in range(5)]
    tests += [ran(9, "failed", message="no such thing")]
    groups = grouped(validate(document("wrong", tests=tests, diagnosis=[])))
    assert [(len(one.tests), one.broken) for one in groups] == [(5, False), (1, False), (1, True)]


def test_every_picture_is_in_the_file_once_however_often_it_is_shown():
    given = document("wrong")
    html = render(given)
    for encoded in given["pictures"].values():
        assert html.count(encoded) == 1
    assert "is on this page already" in html
    assert 'width="1020" height="290"' in html


def test_many_pictures_of_one_cause_are_named_rather_than_embedded():
    names = [f"failures/{n}.png" for n in range(3 * MOST_PICTURES)]
    tests = [
        ran(n, "failed", message=f"case {n}", findings=[finding(pictures=[name])])
        for n, name in enumerate(names)
    ]
    pictures = {name: picture(0) for name in names}
    html = render(document("wrong", tests=tests, pictures=pictures, diagnosis=[]))
    assert html.count("<img ") == MOST_PICTURES
    assert html.count("Picture not on this page") == 2 * MOST_PICTURES


def test_a_picture_that_the_document_lacks_is_named():
    assert "gone/away.png" in render(document("wrong", diagnosis=[finding(pictures=["gone/away.png"])]))


HOSTILE = '</script><script>alert(1)</script><img src=x onerror="a" \'&amp; {{ 7 * 7 }} \x1b[31mred\x1b[0m \x00\ud800'


def test_nothing_of_a_document_becomes_markup():
    given = document(
        "wrong",
        headline=HOSTILE,
        about={"attention": HOSTILE, "baseline": HOSTILE, HOSTILE: HOSTILE},
        machine={HOSTILE: {HOSTILE: [HOSTILE]}},
        calls={HOSTILE: 3},
        cannot_tell=[],
        notes=[HOSTILE],
        diagnosis=[
            finding(HOSTILE, message=HOSTILE, case=HOSTILE, configuration=HOSTILE, pictures=[HOSTILE])
        ],
        suites=[{"name": HOSTILE, "passed": 0, "failed": 1, "skipped": 0, "errors": 0, "seconds": 1}],
        tests=[
            ran(n, outcome, id=HOSTILE, message=HOSTILE, findings=[finding(site=HOSTILE)] * (n % 2))
            for n, outcome in enumerate(("failed", "failed", "failed", "skipped", "error", "passed"))
        ],
        benchmarks=[benchmark(HOSTILE, HOSTILE, 0, 0.9, 1.0, 1.1, "no slower")],
        pictures={HOSTILE: picture()},
    )
    html = render(given)
    page = read(html)
    assert page.tags.count("script") == 1
    assert page.tags.count("img") == 1 and all(ref.startswith(("data:", "#")) for ref in page.references)
    assert "{{ 7 * 7 }}" in page.text and "49" not in page.visible.replace("4.9", "")
    assert "red" in page.text and "[31m" not in html
    html.encode("utf-8")
    assert not [character for character in html if ord(character) < 32 and character not in "\n\t\r"]
    written = summary(given)
    assert "<" not in written.replace("\\<", "") and "\x1b" not in written


def test_an_attribute_cannot_be_left():
    html = render(
        document("wrong", diagnosis=[finding(case='" onload="x', pictures=["a"])], pictures={"a": picture()})
    )
    assert 'alt="Picture of: &#34; onload=&#34;x"' in html


def test_long_messages_are_shortened_in_the_middle():
    message = "begin " + "x" * 100_000 + " end"
    html = render(document("wrong", tests=[ran(0, "failed", message=message)], diagnosis=[]))
    assert len(html) < 60_000 + 3 * MOST_CHARACTERS
    assert "begin" in html and " end" in html and "characters left out" in html


def test_nothing_ran():
    given = document(
        "incomplete",
        tests=[],
        suites=[],
        benchmarks=[],
        cannot_tell=[],
        notes=[],
        calls={},
        about={},
        machine={},
        diagnosis=[],
    )
    page = read(render(given))
    assert "none ran" in page.visible and "No suite ran." in page.text
    assert "No verdict" in page.visible
    assert "table" not in page.tags
    assert "No test ran." in summary(given)


def test_all_right_without_benchmarks_has_no_empty_sections():
    page = read(render(document("right", benchmarks=[])))
    assert page.tags.count("h2") == 0
    assert "Nothing was timed" in page.visible
    assert "Nothing was timed" not in read(render(document("right"))).text


def test_every_ratio_is_drawn_and_said():
    page_of = render(document("slower"))
    page = read(page_of)
    drawn = [*BENCHMARKS, 1]
    assert page_of.count('class="interval"') == len(drawn)
    assert 'aria-label="ratio 1.710, interval 1.600 to 1.830, allowed 1.1: slower"' in page_of
    assert "1.600 to 1.830" in page.visible and "58.2 MiB" in page.visible


def test_ratios_that_are_no_numbers_are_said_not_drawn():
    nan = float("nan")
    html = render(document(benchmarks=[benchmark("x", "y", 0, nan, nan, float("inf"), "inconclusive")]))
    assert "cannot be drawn" in html and "nan%" not in html and "inf%" not in html


@pytest.mark.parametrize("low, high", [(0.97, 1.03), (0.5, 0.6), (0.08, 1.9), (0.001, 400), (1e-9, 1e9)])
def test_scale_holds_everything_and_its_ticks_can_be_read(low, high):
    scale = Scale.of([benchmark("x", "y", 0, low, (low * high) ** 0.5, high, "inconclusive")])
    for value in (low, high, 1.0, 1.1):
        assert scale.low < value < scale.high
        assert 0 < scale.at(value) < 100
    # Twice as fast is as far from 1 as half as fast, but for the rounding of both places.
    assert scale.at(1.1) - scale.at(1) == pytest.approx(scale.at(1) - scale.at(1 / 1.1), abs=0.02)
    ticks = scale.ticks()
    assert "1" in [label for _, label in ticks]
    assert all(b[0] - a[0] >= LEAST_GAP for a, b in zip(ticks, ticks[1:], strict=False))


def test_a_large_run_stays_small_and_quick():
    tests = [ran(n) for n in range(2_700)]
    tests += [
        ran(
            3_000 + n,
            "failed",
            message=f"gate: off by {n}" * 5,
            findings=[finding(layer=n % 6, head=n % 8, configuration=f"only L{n % 6}H{n % 8}")],
        )
        for n in range(300)
    ]
    started = time.process_time()
    html = render(document("wrong", tests=tests))
    took = time.process_time() - started
    # Half a second, on a machine that may be busy.
    assert took < 5, f"{took:.1f} s"
    assert len(html) < 1_200_000
    page = read(html)
    assert page.tags.count("tr") >= 3_000
    # What is seen at once does not grow with the number of tests.
    assert len(page.visible) < 1.2 * len(read(render(document("wrong"))).visible)


def test_time_is_a_ratio_and_a_quick_wrong_result_is_called_so():
    slow = finding("time", message="takes 1.71 times", site=None, layer=None, error=1.71, budget=1.1)
    quick = benchmark("x", "y", 0, 0.5, 0.6, 0.7, "faster", outputs="wrong")
    page = read(render(document("slower", tests=[ran(0, "failed", findings=[slow])], benchmarks=[quick])))
    assert "worst ratio 1.710, allowed 1.100" in page.visible and "1.55 times what is allowed" in page.visible
    assert "and wrong" in page.visible
    assert "and wrong" not in read(render(document("slower"))).visible
    assert "| faster, and wrong |" in summary(document("wrong", benchmarks=[quick]))


def test_summary_tells_the_causes_and_ratios():
    written = summary(document("wrong"))
    assert written.startswith("### ❌ Wrong\n\n")
    assert "186 tests: 62 failed, 120 passed, 4 skipped" in written
    assert "- **gate at decoder\\_cross**: 60 tests" in written
    slower = summary(document("slower"))
    rows = [line for line in slower.splitlines() if line.startswith("| ")]
    assert rows[2].endswith("| 8 | 1.710 | 1.600 to 1.830 | slower |")
    assert len(summary(document(benchmarks=BENCHMARKS * 30)).splitlines()) < 50


def test_wrong_answers_that_tolerances_accept_come_with_the_verdict():
    accepted = ["none off passes as first 1 off", "scale off by a hundredth"]
    page = read(render(document("right", cannot_tell=accepted)))
    place = page.visible.index("Tolerances accept 2 wrong answers here")
    assert place < page.visible.index(accepted[0]) < page.visible.index("tests:")
    written = summary(document("right", cannot_tell=[*accepted, *map(str, range(9))]))
    assert written.index("Tolerances accept 11 wrong answers here") < written.index(accepted[1])
    assert "- and 6 more" in written


def damage(**changes):
    """Makes a document that is wrong in one entry; pictures are not drawn before a test needs them."""
    return lambda: {**document("wrong"), **changes}


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda: None, "no entry 'format'"),
        (list, "no entry 'format'"),
        (lambda: {"format": "headoff relevance maps 1"}, "its format is 'headoff relevance maps 1'"),
        (damage(verdict="good"), "verdict is 'good', not one of right, wrong, slower, incomplete"),
        (damage(headline=3), "headline is 3, not a text"),
        (damage(notes="none"), "notes is 'none', not a list"),
        (damage(calls={"decoder_cross": 1.5}), r"calls\['decoder_cross'\] is 1.5, not a whole number"),
        (damage(calls={"decoder_cross": True}), "is True, not a whole number"),
        (damage(diagnosis=[finding(head="2")]), r"diagnosis\[0\]\.head is '2', not a whole number or null"),
        (damage(tests=[ran(0, "xfailed")]), r"tests\[0\]\.outcome is 'xfailed', not one of passed"),
        (damage(benchmarks=[{}]), r"benchmarks\[0\]\.name is missing"),
        (damage(pictures={"a.png": "aGVsbG8="}), r"pictures\['a.png'\] is not a PNG"),
        (damage(pictures={"a.png": "no base64"}), r"pictures\['a.png'\] is not a PNG"),
        (lambda: {key: value for key, value in document().items() if key != "tests"}, "tests is missing"),
    ],
)
def test_what_is_not_such_a_document_is_said_in_a_sentence(wrong, words):
    wrong = wrong()
    for function in (validate, render, summary):
        with pytest.raises(SettingError, match=words):
            function(wrong)


def test_documents_of_later_versions_may_hold_more():
    extended = document("wrong", something={"new": 1}, diagnosis=[{**finding("a new property"), "more": 1}])
    assert "a new property" in render(extended)


def test_the_record_of_a_finding_is_what_findings_write():
    fields = {field.name: field.type for field in dataclasses.fields(Finding)}
    assert set(get_type_hints(FindingRecord)) == set(fields)
    written = Finding(
        "gate", "a message", "a case", 1.0, 0.5, "decoder_cross", 1, 2, "first 1 off", ("a.png",)
    ).as_dict()
    assert validate(document("wrong", diagnosis=[json.loads(json.dumps(written))]))["diagnosis"] == [written]
    least = Finding("crash", "a message", "a case").as_dict()
    assert "a message" in render(document("wrong", diagnosis=[least]))


def test_every_property_of_findings_has_its_words():
    assert set(WORDS) == set(PROPERTIES)


def test_words():
    assert [format_seconds(s) for s in (0, 3.1e-8, 4.56e-5, 0.31, 0.9999, 12.34, 59.99, 65.2, 7325)] == [
        *("0 s", "31.0 ns", "45.6 µs", "310 ms", "1.00 s", "12.3 s", "60.0 s", "1 min 5 s", "2 h 2 min")
    ]
    assert [format_bytes(m, unknown="") for m in (None, 0, 1023, 2**20, 3 * 2**29)] == [
        "",
        "0 B",
        "1023 B",
        "1.00 MiB",
        "1.50 GiB",
    ]
    assert [format_ratio(r) for r in (0.834, 1.0, 123.4, float("inf"))] == [
        "0.834",
        "1.000",
        "123",
        "infinite",
    ]
    assert [format_error(e) for e in (3.14e-2, float("inf"), float("nan"))] == ["3.1e-02", "infinite", "NaN"]
    assert [format_times(t) for t in (2.5, 123.4, 7561, 3e8, float("inf"))] == [
        *("2.50 times", "120 times", "7,600 times", "3e+08 times", "infinitely many times")
    ]
    assert excess(finding(error=2.0, budget=0.5)) == 4
    assert excess(finding(error=float("nan"))) == excess(finding(budget=0)) == float("inf")
    assert excess(finding(error=None)) is None
    assert places(
        [finding(layer=n, head=h, configuration=f"first {n} off") for n, h in ((10, 1), (2, 5), (3, 1))]
    ) == ("decoder_cross, layers 2-3, 10, heads 1, 5, first 2 off; first 3 off; first 10 off")


def test_files(tmp_path):
    source = tmp_path / "results.json"
    source.write_text(json.dumps(document("wrong")), encoding="utf-8")
    page = render_file(source, tmp_path / "report.html")
    assert page.read_text(encoding="utf-8") == render(document("wrong"))
    assert render_file(str(source), tmp_path / "summary.md").read_text(encoding="utf-8") == summary(
        document("wrong")
    )


def test_infinite_errors_survive_the_file(tmp_path):
    source = tmp_path / "results.json"
    source.write_text(json.dumps(document("wrong", diagnosis=[finding(error=float("inf"))])))
    assert "infinite" in render_file(source, tmp_path / "report.html").read_text(encoding="utf-8")


def test_files_that_cannot_be(tmp_path):
    source = tmp_path / "results.json"
    target = tmp_path / "report.html"
    with pytest.raises(SettingError, match=r"results.json' cannot be read \(No such file"):
        render_file(source, target)
    for contents, words in ((b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"{}", "no entry 'format'")):
        source.write_bytes(contents)
        with pytest.raises(SettingError, match=words):
            render_file(source, target)
    assert list(tmp_path.iterdir()) == [source]
    source.write_text(json.dumps(document()))
    with pytest.raises(SettingError, match=r"not as 'report.pdf'"):
        render_file(source, tmp_path / "report.pdf")
    with pytest.raises(OutputError, match=r"cannot be written .*: choose another place"):
        render_file(source, source / "report.html")


def test_rendering_needs_neither_torch_nor_pytest():
    code = "import sys, headoff.harness.report as page; print({'torch', 'pytest', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
