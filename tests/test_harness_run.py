"""The document of a run: verdict, headline, what of it is kept; and the root of many failures."""

from __future__ import annotations

import json
import math

import pytest
import torch

from headoff import cli
from headoff.attention import register_attention, registry
from headoff.attention.eager import eager
from headoff.choices import DTYPES
from headoff.cli import verify
from headoff.detr.checkpoints import ModelChoice
from headoff.errors import SettingError
from headoff.harness.finding import PROPERTIES, Finding, WrongAttention, fail_on
from headoff.harness.operator import case_named, case_of_text, operator_cases
from headoff.harness.plugin.diagnosis import diagnose_run
from headoff.harness.plugin.run import Run, suite_of
from headoff.harness.settings import OPTIONS, Settings, read_settings


def run_of(*tests, **about) -> Run:
    """A run of tests, each (suite, outcome, calls of the patch, findings...)."""
    run = Run({"attention": "kernel.py:mine", "baseline": "sdpa", **about})
    for number, (suite, outcome, calls, *findings) in enumerate(tests):
        noted = {
            "calls_credited": calls,
            "findings": [one.as_dict() for one in findings],
            "calls": {"decoder_cross": 6},
            "message": "something" if outcome == "failed" else "",
        }
        run.add(f"tests/test_heads_off_{suite}.py::test_{number}", "call", outcome, 0.5, noted)
    return run


WRONG = Finding(
    "gate", "the gate is ignored; and numbers", "a case", 1.0, 0.1, site="decoder_cross", layer=2, head=5
)
SLOW = Finding("time", "1.5 times as slow", "a workload", 1.5, 1.1)


@pytest.mark.parametrize(
    "tests, verdict, said",
    [
        ([("operator", "passed", 1)], "right", "is right: 1 check passed"),
        ([("operator", "passed", 1), ("operator", "passed", 0)], "right", "is right: 1 check passed"),
        ([("operator", "passed", 1), ("operator", "failed", 1, WRONG)], "wrong", "is wrong: gate: the gate is"),
        ([("benchmark", "failed", 1, SLOW), ("operator", "passed", 1)], "slower", "is right but slower in 1"),
        ([("benchmark", "failed", 1, WRONG)], "wrong", "is wrong: gate"),
        ([("benchmark", "failed", 1, WRONG, SLOW)], "wrong", "is wrong: gate"),
        ([("operator", "skipped", 0)], "incomplete", "no test that ran called it"),
        ([("operator", "passed", 0)], "incomplete", "no test that ran called it"),
        ([("operator", "passed", 1), ("operator", "failed", 1)], "incomplete", "no verdict, because tests/test_heads"),
        ([("operator", "passed", 1), ("operator", "failed", 0, WRONG)], "incomplete", "never called it"),
        ([("operator", "failed", 1, WRONG), ("operator", "failed", 0)], "wrong", "is wrong: gate"),
        ([], "incomplete", "no test that ran called it"),
    ],
)  # fmt: skip
def test_verdict_and_headline(tests, verdict, said):
    run = run_of(*tests)
    assert run.verdict == verdict
    assert (
        run.headline().startswith("kernel.py:mine") and said in run.headline() and "\n" not in run.headline()
    )


def test_an_interrupted_run_has_no_verdict_unless_something_was_wrong():
    run = run_of(("operator", "passed", 1))
    run.interrupted = True
    assert run.verdict == "incomplete" and "interrupted after 1 test," in run.headline()
    run = run_of(("operator", "failed", 1, WRONG))
    run.interrupted = True
    assert run.verdict == "wrong"


ID = "tests/test_heads_off_operator.py::test"


def told(*events) -> Run:
    """A run of two collected checks, of which the events tell."""
    run = Run({"attention": "kernel.py:mine", "baseline": "sdpa"})
    for event in ({"collected": 2}, *events):
        run.take(json.loads(json.dumps(event)))
    return run


def check(number, *findings) -> list[dict]:
    """Events of a check that called the patch."""
    noted = {"calls_credited": 1, "findings": [finding.as_dict() for finding in findings]}
    phases = (("setup", {}), ("call", noted), ("teardown", {}))
    return [
        {"test": {"id": f"{ID}{number}", "phase": phase, "outcome": outcome, "seconds": 1.0, "noted": what}}
        for phase, what in phases
        for outcome in ["failed" if findings and phase == "call" else "passed"]
    ]


@pytest.mark.parametrize(
    "events, how, verdict, said",
    [
        ([*check(1), *check(2), {"finished": True}], "", "right", "2 checks passed"),
        ([*check(1), *check(2)], "ended by X", "incomplete", "because it ended by X (2 of 2 checks were done)"),
        ([*check(1, WRONG), *check(2)], "ended by X", "incomplete", "because it ended by X (2 of 2"),
        ([*check(1), {"finished": True}], "", "incomplete", "because only 1 of 2 checks were done"),
        ([*check(1), *check(2)[:2], {"finished": True}], "", "incomplete", "because only 1 of 2 checks were done"),
        ([*check(1, WRONG), {"finished": True}], "", "wrong", "is wrong: gate"),
        ([*check(1, WRONG), *check(2), {"finished": True}], "ended by X", "wrong", "is wrong: gate"),
        ([*check(1, WRONG), {"broken": "it crashed"}, {"finished": True}], "", "incomplete", "because it crashed"),
        ([*check(1), {"interrupted": True, "finished": True}], "", "incomplete", "interrupted after 1 test,"),
    ],
)  # fmt: skip
def test_a_verdict_is_of_a_complete_report(events, how, verdict, said):
    run = told(*events)
    run.end(how)
    assert run.verdict == verdict and said in run.headline()
    if how and verdict == "wrong":
        assert "its cause was not found: it ended by X" in run.document()["notes"]


def test_the_headline_says_where_and_leaves_numbers_for_later():
    assert run_of(("operator", "failed", 1, WRONG)).headline() == (
        "kernel.py:mine is wrong: gate: the gate is ignored; in the model first at decoder_cross layer 2, head 5"
    )


def test_phases_of_a_test_are_one_record():
    run = Run({"attention": "a", "baseline": "sdpa"})
    noted = {"unsupported": {"float64": "no"}}
    for phase, outcome in (("setup", "passed"), ("call", "passed"), ("teardown", "failed")):
        run.add("tests/test_heads_off_calls.py::test", phase, outcome, 1.0, noted)
    (record,) = run.tests.values()
    assert (record.outcome, record.seconds, record.suite) == ("error", 3.0, "calls")
    assert run.suites() == [
        {"name": "calls", "passed": 0, "failed": 0, "skipped": 0, "errors": 1, "seconds": 3.0}
    ]
    assert run.document()["notes"] == ["float64 is not supported by it and was not tested: no"]


def test_a_document_is_strict_json_with_few_pictures(tmp_path):
    pictures = []
    for number in range(30):
        path = tmp_path / f"{number}.png"
        path.write_bytes(b"picture")
        pictures.append(Finding("relevance", "off", "case", math.inf, 1.0, pictures=(str(path),)))
    run = run_of(("relevance", "failed", 1, *pictures))
    document = json.loads(json.dumps(run.document(), allow_nan=False))
    assert document["tests"][0]["findings"][0]["error"] is None
    assert 0 < len(document["pictures"]) < 10
    assert [Finding.from_dict(one) for one in document["tests"][0]["findings"]][0].property == "relevance"


def test_suites_are_named_by_their_files():
    assert suite_of("tests/test_heads_off_operator.py::test_x[a::b]") == "operator"


def test_refusing_nothing_passes_and_findings_go_with_the_failure():
    fail_on([])
    with pytest.raises(WrongAttention, match="gate: the gate is ignored") as raised:
        fail_on([WRONG, SLOW])
    assert raised.value.findings == (WRONG, SLOW)


def test_a_case_is_known_again_by_its_text():
    for dtype in (torch.float32, torch.bfloat16):
        for case in operator_cases(dtype, 3):
            assert case_of_text(str(case), 3) == case
    assert case_of_text("scene-000, first 1 off", 0) is None


@pytest.fixture
def attention_named():
    """`attention_named(name, callable)` registers it for the test."""
    known = dict(registry._registered)
    yield register_attention
    registry._registered.clear()
    registry._registered.update(known)


def test_the_root_is_found_and_its_place_in_the_model(attention_named):
    def ungated(query, key, value, attn_mask=None, *, head_gate=None):
        return eager(query, key, value, attn_mask)

    attention_named("ungated", ungated)
    case = case_named("gate-first-3", torch.float32, 0)
    failed = Finding("context", "off", str(case), 1.0, 0.1)
    crash = Finding("crash", "raises ValueError", "elsewhere")
    causes, notes = diagnose_run(
        run_of(("operator", "failed", 1, crash, failed)), Settings(attention="ungated")
    )
    assert not notes
    assert causes[0].property == "gate" and "ignored" in causes[0].message
    assert (
        causes[0].site == "decoder_cross"
        and causes[0].layer == 0
        and "first 1 off" in str(causes[0].configuration)
    )
    assert "crash" in [one.property for one in causes]
    assert all(one.property in PROPERTIES for one in causes)


def test_side_effects_come_before_numbers(attention_named):
    attention_named("fine", eager)
    state = Finding("state", "kept the first mask", "fresh-masks")
    causes, _ = diagnose_run(run_of(("operator", "failed", 1, state)), Settings(attention="fine"))
    assert [one.property for one in causes] == ["state"]


def test_what_cannot_be_found_out_is_a_note(attention_named):
    attention_named("fine", eager)
    settings = Settings(attention="fine", model="no-such-model")
    causes, notes = diagnose_run(
        run_of(("relevance", "failed", 1, Finding("relevance", "off", "case"))), settings
    )
    assert [one.property for one in causes] == ["relevance"]
    assert len(notes) == 1 and "no-such-model" in notes[0]


def test_settings_are_read_from_the_texts_of_options():
    assert read_settings({}) == read_settings({option.name: None for option in OPTIONS})
    (chosen,) = read_settings({"image": ["one.png", "two.png"], "max-slowdown": "1.5", "device": "cpu"})
    assert [image.name for image in chosen.images] == ["one.png", "two.png"] and chosen.max_slowdown == 1.5
    assert (chosen.dtype, chosen.dtypes) == ("float32", ("float32",))
    both = read_settings({"dtype": ["bfloat16", "float32", "bfloat16"]})
    assert [one.dtype for one in both] == ["bfloat16", "float32"]
    assert {one.dtypes for one in both} == {("bfloat16", "float32")}
    assert [one.dtype for one in read_settings({"dtype": ["all"]})] == list(DTYPES)


def test_what_a_models_file_may_not_say_is_part_of_the_model(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\n\n dog \n")
    texts = {
        "model": "m.pth",
        "heads-per-layer": "4",
        "dc5": "no",
        "classes": str(names),
        "short-side": "160",
    }
    (chosen,) = read_settings(texts)
    assert chosen.model_choice == ModelChoice("m.pth", 4, False, ("cat", "dog"), 160)
    assert read_settings({"dc5": "yes"})[0].model_choice.dilated is True
    with pytest.raises(SettingError, match="--classes: .* cannot be read"):
        read_settings({"classes": str(tmp_path)})[0].model_choice  # noqa: B018
    parsed = cli.parser().parse_args(["verify", "k.py:f", "--no-dc5", "--heads-per-layer", "4"])
    assert verify._texts(parsed)["dc5"] == "no" and verify._texts(parsed)["heads-per-layer"] == "4"
    assert verify._texts(cli.parser().parse_args(["verify", "k.py:f"]))["dc5"] is None


@pytest.mark.parametrize(
    "texts, said",
    [
        ({"dtype": ["bfloat1"]}, "did you mean 'bfloat16'?"),
        ({"dc5": "maybe"}, "--dc5 cannot be 'maybe': give yes or no"),
        ({"seed": "-1"}, "--seed cannot be '-1': give a whole number from 0"),
        ({"bench-seconds": "inf"}, "--bench-seconds cannot be 'inf': give a number from 0"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(texts, said):
    with pytest.raises(SettingError) as raised:
        read_settings(texts)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_finding_needs_no_case():
    finding = Finding("gate", "switching off a head without output changes maps by 1e-3 (allowed 1e-6)")
    assert Finding.from_dict(finding.as_dict()) == finding
