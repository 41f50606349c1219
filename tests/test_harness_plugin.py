"""The pytest plugin: options, one clear error, what is said at the end, reports, workers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import syrupy
import torch
import torch._inductor.test_operators  # noqa: F401  a nested run that imports it leaves it half registered
from relevance_examples import tiny_detector
from test_checkpoints import original_names

# What a nested run imports is forgotten after it: what is here already is not imported again by every one.
import headoff.harness.model.attention_calls
import headoff.harness.operator
import headoff.harness.report.html  # noqa: F401
from headoff.attention import resolve_attention
from headoff.errors import AttentionError
from headoff.files import marked_folder
from headoff.harness.plugin import diagnosis
from headoff.harness.plugin import preflight as preflights
from headoff.harness.plugin.preflight import FirstCall, first_calls, preflight

pytest_plugins = ["pytester"]

SUITE = """
import pytest
import torch
from headoff.harness.finding import Finding, fail_on

def call(patch):
    query = torch.zeros(1, 1, 2, 4)
    return patch.attention(query, query, query)

def test_heads_off_one(under_test):
    call(under_test)
    if under_test.label.endswith("wrong"):
        under_test.not_supported("float64", "TypeError: no doubles")
        under_test.calls["decoder_cross"] += 3
        fail_on([Finding("gate", "the gate is ignored (error 1e-1, allowed 1e-6)", "a case", 1e-1, 1e-6)])

def test_heads_off_two(under_test):
    under_test.once(call, under_test)
    under_test.calls["decoder_cross"] += 4
    assert under_test.seed == {seed}

def test_heads_off_three(under_test):
    under_test.once(call, under_test)

def test_heads_off_without_the_patch():
    pass
"""

KERNEL = """
import torch
from torch.nn.functional import scaled_dot_product_attention

def right(query, key, value, attn_mask=None):
    return scaled_dot_product_attention(query, key, value, attn_mask)

wrong = right

def crashing(query, key, value, attn_mask=None):
    raise ValueError("out of luck")

def no_single_query(query, key, value, attn_mask=None):
    if query.shape[2] == 1:
        raise ValueError("one query")
    return right(query, key, value, attn_mask)

def no_doubles(query, key, value, attn_mask=None):
    return right(query, key, value, attn_mask).float()

def only_float32(query, key, value, attn_mask=None):
    if query.dtype != torch.float32:
        raise TypeError("float32, please")
    return right(query, key, value, attn_mask)

def killed(query, key, value, attn_mask=None):
    import os, signal
    os.kill(os.getpid(), signal.SIGABRT)

def forward_only(query, key, value, attn_mask=None):
    return right(query, key, value, attn_mask).detach()

def transposed(query, key, value, attn_mask=None):
    return right(query, key, value, attn_mask).transpose(1, 2)

def no_tensor(query, key, value, attn_mask=None, *, head_gate=None):
    return [query]

def gateless(query, key, value, attn_mask=None, *, head_gate=None):
    if head_gate is not None:
        raise KeyError("gate")
    return right(query, key, value, attn_mask)

class OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, attn_mask=None):
        return query.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("uphill")

one_way = OneWay.apply
"""


@pytest.fixture
def run(pytester, at_a_desk, monkeypatch):
    """`run(*options, seed=0, suite=SUITE)` runs a suite, by default of four tests of which three call the patch.

    First calls are made in this process, as under `headoff verify`, unless they are made `apart`: another process takes
    seconds to import torch.
    """
    pytester.makepyfile(kernel=KERNEL)

    def run_suite(
        *options: str, seed: int = 0, suite: str = SUITE, files=(), apart: bool = False
    ) -> pytest.RunResult:
        monkeypatch.setattr(preflights, "is_watched", lambda: not apart)
        pytester.makepyfile(test_heads_off_mine=suite.replace("{seed}", str(seed)), **dict(files))
        # syrupy keeps the running session in a global: give the outer one its own back.
        outer = syrupy._syrupy
        try:
            return pytester.runpytest_inprocess(
                "-p", "headoff.harness.plugin.hooks", "-p", "no:randomly", *options
            )
        finally:
            syrupy._syrupy = outer

    return run_suite


@pytest.fixture
def no_search(monkeypatch):
    """A wrong patch is not looked for in the model: that takes seconds, and test_harness_diagnosis.py has its tests."""
    monkeypatch.setattr(diagnosis, "places_in_model", lambda *_: [])


def section(result: pytest.RunResult) -> list[str]:
    """The lines of our section of the summary, its headline first."""
    lines = result.outlines
    start = next(index for index, line in enumerate(lines) if line.strip("= ") == "headoff")
    rest = lines[start + 1 :]
    return rest[: next(index for index, line in enumerate(rest) if line.startswith("==="))]


def test_a_right_attention(run):
    result = run("--attention", "kernel.py:right")
    result.assert_outcomes(passed=4)
    assert section(result)[0] == "kernel.py:right is right: 3 checks passed"  # of four tests
    assert "called in the model: decoder_cross 4" in section(result)[1]


def test_what_is_assumed_of_a_model_is_said(run, tmp_path):
    torch.save(
        {"model": original_names(tiny_detector(dtype=torch.float32).state_dict())}, tmp_path / "my.pth"
    )
    options = ("--attention", "kernel.py:right", "--model", str(tmp_path / "my.pth"))
    guessed = "\n".join(section(run(*options, "--report", "guessed.json")))
    assert "8 heads assumed" in guessed and "--heads-per-layer" in guessed
    assert "8 heads assumed" in " ".join(json.loads(Path("guessed.json").read_text())["notes"])
    told = ("--headoff-heads-per-layer=4", "--headoff-dc5=no", "--report", "told.json")
    assert "assumed" not in "\n".join(section(run(*options, *told)))
    assert json.loads(Path("told.json").read_text())["about"]["heads"] == "4 in each layer"


@pytest.mark.parametrize(
    "workers", [(), pytest.param(("-n", "1"), marks=pytest.mark.slow)], ids=["alone", "workers"]
)
def test_pictures_of_an_earlier_run_are_removed_by_runs_that_draw_others(run, pytester, workers):
    if workers:
        pytest.importorskip("xdist")
    picture = marked_folder(pytester.path / "headoff-failures") / "old.png"
    picture.touch()
    run(*workers, "test_other.py", files={"test_other": "def test_other(): pass"}).assert_outcomes(passed=1)
    assert picture.exists()
    run(*workers, "--attention", "kernel.py:right", "test_heads_off_mine.py").assert_outcomes(passed=4)
    assert not picture.exists()


def test_a_wrong_attention_is_named_before_its_failures(run):
    result = run("--attention", "kernel.py:wrong")
    result.assert_outcomes(passed=3, failed=1)
    headline = section(result)[0]
    assert headline == "kernel.py:wrong is wrong: gate: the gate is ignored (error 1e-1, allowed 1e-6)"
    lines = result.outlines
    assert lines.index(headline) < next(i for i, line in enumerate(lines) if "FAILURES" in line)
    assert any("float64 is not supported" in line and "no doubles" in line for line in section(result))
    assert any(line == "  called in the model: decoder_cross 7" for line in section(result))
    assert "Traceback" not in result.stdout.str() and "Error" not in headline


NOTES = """
def test_heads_off_notes(under_test):
    call(under_test)
    under_test.cannot_tell("first 1 off passes as none off")
    under_test.observed([Finding("dq", "off by 3e-2"), Finding("dq", "off by 3e-2")], "float16")
"""


def assert_noted(document):
    assert document["cannot_tell"] == ["first 1 off passes as none off"]
    assert document["notes"][-1] == "float16, which nobody asked for, is wrong: dq: off by 3e-2"


def test_notes_of_the_tests_reach_the_summary(run, pytester):
    result = run("--attention", "kernel.py:right", "--report", "out.json", suite=SUITE + NOTES)
    assert result.ret == 0
    assert_noted(json.loads((pytester.path / "out.json").read_text()))
    assert any("first 1 off passes as none off" in line for line in section(result)[:3])


def test_workers_find_and_note_the_same(run, pytester, no_search):
    pytest.importorskip("xdist")
    options = ("--attention", "kernel.py:wrong", "--report", "out.json")
    alone, shared = (run(*options, "-n", count, suite=SUITE + NOTES) for count in ("0", "1"))
    shared.assert_outcomes(passed=4, failed=1)
    assert section(shared) == section(alone)
    assert_noted(json.loads((pytester.path / "out.json").read_text()))


@pytest.mark.parametrize(
    "name, said",
    [
        ("kernel.py:killed", "ended its process by SIGABRT"),
        ("kernel.py:nobody", "has no 'nobody'"),
    ],
)
def test_what_cannot_be_tested_is_one_error(run, name, said):
    result = run("--attention", name, apart="killed" in name)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    errors = [line for line in result.errlines if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("ERROR: headoff: ") and said in errors[0]
    assert "passed" not in result.stdout.str() and "failed" not in result.stdout.str()


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "crashing",
            "raised ValueError: out of luck ({folder}/kernel.py, line 11) when called as in encoder_self (144 queries",
        ),
        ("forward_only", "returned a context without a gradient"),
        ("transposed", "context of shape (1, 144, 8, 32)"),
        ("no_tensor", "returned a list"),
        ("one_way", "has no backward pass that works: it raised RuntimeError: uphill"),
        ("gateless", "raised KeyError: 'gate' ({folder}/kernel.py, line"),
    ],
)
def test_first_calls_say_what_is_wrong(tmp_path, name, said):
    file = tmp_path / "kernel.py"
    file.write_text(KERNEL)
    spec = f"{file}:{name}"
    with pytest.raises(AttentionError) as raised:
        first_calls(resolve_attention(spec), spec, torch.device("cpu"), torch.float32)
    assert said.format(folder=tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_what_does_not_come_back_is_one_error(tmp_path):
    file = tmp_path / "kernel.py"
    file.write_text("import time\ndef sleepy(query, key, value, attn_mask=None):\n    time.sleep(600)\n")
    with pytest.raises(AttentionError, match="did not come back from its first calls within 1 s"):
        preflight(FirstCall(f"{file}:sleepy", "cpu", "float32"), 1.0)


def test_with_workers_it_is_one_error_as_well(run):
    pytest.importorskip("xdist")
    result = run("--attention", "kernel.py:crashing", "-n", "2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.errlines if line.strip()] == [
        line for line in result.errlines if "out of luck" in line
    ]


@pytest.mark.parametrize(
    "options, said",
    [
        (("--dtype", "int8"), "dtype 'int8' is not known"),
        (("--device", "abacus"), "device 'abacus' cannot be used here"),
        (("--headoff-seed", "minus one"), "--seed cannot be 'minus one'"),
        (("--max-slowdown", "nan"), "--max-slowdown cannot be 'nan'"),
        (("--report", "report.pdf"), "give a name that ends in .html or .json"),
        (("--report", "nowhere/report.html"), "there is no folder"),
    ],
)
def test_a_setting_that_cannot_be_is_one_error(run, options, said):
    result = run(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    errors = [line for line in result.errlines if line.strip()]
    assert len(errors) == 1 and said in errors[0]


def test_the_configuration_file_serves_as_well_and_the_command_line_wins(run, pytester, no_search):
    pytester.makeini("[pytest]\nheadoff_attention = kernel.py:wrong\nheadoff_seed = 5\n")
    assert "wrong: gate" in section(run(seed=5))[0]
    assert "kernel.py:right is right" in section(run("--attention", "kernel.py:right", seed=5))[0]


def test_an_option_that_somebody_else_has_keeps_its_long_name(run, pytester):
    pytester.makeconftest("def pytest_addoption(parser):\n    parser.addoption('--device', default='mine')\n")
    result = run("--headoff-device", "cpu", "--device", "theirs", "--attention", "kernel.py:right")
    result.assert_outcomes(passed=4)


def test_a_report(run, pytester, no_search):
    result = run("--attention", "kernel.py:wrong", "--report", "report.html")
    document = json.loads((pytester.path / "report.json").read_text())
    assert document["headline"] == section(result)[0]
    assert document["verdict"] == "wrong"
    assert document["suites"] == [document["suites"][0] | {"name": "mine", "passed": 3, "failed": 1}]
    assert document["calls"] == {"decoder_cross": 7}
    assert document["about"]["attention"] == "kernel.py:wrong" and document["about"]["torch"]
    assert document["headline"].split(":")[-1].strip() in (pytester.path / "report.html").read_text()


DTYPES = """
import pytest
import torch
from headoff.harness.finding import Finding, fail_on

def test_heads_off_dtype(under_test):
    query = torch.zeros(1, 1, 2, 4, dtype=under_test.dtype)
    found = under_test.attention(query, query, query).dtype
    if found != query.dtype:
        fail_on([Finding("dtype", f"the context of {query.dtype} is {found}")])

def test_heads_off_golden(under_test, snapshot):
    under_test.attention(*[torch.zeros(1, 1, 2, 4)] * 3)
"""


def test_a_verdict_is_about_the_dtypes_asked_for(run, pytester, no_search):
    one = run("--attention", "kernel.py:no_doubles", "-v", suite=DTYPES)
    assert one.ret == 0
    one.stdout.fnmatch_lines(["test_heads_off_mine.py::test_heads_off_dtype PASSED*"])
    options = ("--dtype", "float32", "--dtype", "float64", "--report", "out.json", "-v")
    both = run("--attention", "kernel.py:no_doubles", *options, suite=DTYPES)
    assert both.ret == 1
    both.assert_outcomes(passed=2, failed=1)
    both.stdout.fnmatch_lines(
        ["*test_heads_off_dtype[[]float32] PASSED*", "*test_heads_off_dtype[[]float64] FAILED*"]
    )
    both.stdout.fnmatch_lines(["*test_heads_off_golden PASSED*"])  # golden files are named by tests
    assert "is wrong: dtype: the context of torch.float64 is torch.float32" in section(both)[0]
    assert json.loads((pytester.path / "out.json").read_text())["about"]["dtype"] == "float32, float64"


def test_every_dtype_asked_for_is_tried_before_the_tests(run):
    result = run("--attention", "kernel.py:only_float32", "--dtype", "all", suite=DTYPES)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "only_float32 raised TypeError: float32, please" in "".join(result.errlines)


NOT_THE_PATCH = """
@pytest.fixture
def no_file(under_test):
    call(under_test)
    raise RuntimeError("no such file")

@pytest.fixture
def fails(under_test):
    call(under_test)
    fail_on([Finding("gate", "ignored")])

@pytest.fixture
def fails_in_teardown(under_test):
    yield
    call(under_test)
    fail_on([Finding("gate", "ignored")])

def test_a_plain_assert(under_test):
    call(under_test)
    assert 1 == 2, "the numbers do not add up"

def test_a_stale_golden_file(under_test):
    call(under_test)
    pytest.fail("there is no golden file: run `pytest --snapshot-update`")

def test_a_fixture(under_test, no_file):
    pass

def test_findings_in_a_fixture(under_test, fails):
    pass

def test_findings_in_a_teardown(under_test, fails_in_teardown):
    call(under_test)

def test_the_tolerance_rejects_wrong_gates(under_test):
    assert not ["head 3 wrong passes"]

def test_findings_without_a_call(under_test):
    fail_on([Finding("gate", "ignored")])

def test_an_error_of_the_harness(under_test):
    call(under_test)
    raise KeyError("scene-000")
"""


@pytest.mark.parametrize("name", ["right", "wrong"])
def test_only_a_wrong_answer_is_about_the_patch(run, pytester, name, no_search):
    result = run("--attention", f"kernel.py:{name}", "--report", "out.json", suite=SUITE + NOT_THE_PATCH)
    document = json.loads((pytester.path / "out.json").read_text())
    problems = {test["id"].split("::")[1]: test["problem"] for test in document["tests"] if test["problem"]}
    assert set(problems) == set(re.findall(r"def (test_\w+)", NOT_THE_PATCH))
    assert "never called it" in problems["test_findings_without_a_call"]
    headline, *lines = section(result)
    assert headline == document["headline"]
    sentence = (
        "test_heads_off_mine.py::test_a_plain_assert failed for a reason that is not the attention "
        "(and 7 other tests): AssertionError: the numbers do not add up; fix that and run again"
    )
    if name == "right":
        assert result.ret == 2 and document["verdict"] == "incomplete" and not document["diagnosis"]
        assert headline == f"kernel.py:right: no verdict, because {sentence}"
    else:
        assert result.ret == 1 and document["verdict"] == "wrong"
        assert headline.startswith("kernel.py:wrong is wrong: gate: the gate is ignored (error")
        assert f"  not about the attention: {sentence}" in lines


def test_an_exception_of_the_patch_is_its_fault(run, no_search):
    suite = (
        SUITE
        + """
def test_heads_off_raises(under_test):
    query = torch.zeros(1, 1, 1, 4)
    under_test.attention(query, query, query)
"""
    )
    result = run("--attention", "kernel.py:no_single_query", suite=suite)
    assert result.ret == 1
    assert section(result)[0].startswith(
        "kernel.py:no_single_query is wrong: crash: it raised ValueError: one query"
    )


def test_an_attention_that_exits_is_wrong(run):
    exits_in_forward = "import sys\nn = 0\n" + KERNEL.replace("def right(", "def plain(").replace(
        "wrong = right",
        """
def right(query, key, value, attn_mask=None):
    if query.shape[2] == 2:
        sys.exit(0)
    return plain(query, key, value, attn_mask)
""",
    )
    result = run("--attention", "exits.py:right", files={"exits": exits_in_forward})
    said = "exits.py:right is wrong: crash: it raised AttentionError: it called sys.exit(0)"
    assert section(result)[0].startswith(said)
    assert result.ret == 1


def test_nothing_that_calls_the_patch_is_no_verdict(run):
    result = run("--attention", "kernel.py:right", "-k", "without_the_patch")
    assert result.ret == 2
    assert section(result)[0] == "kernel.py:right: no verdict, because no test that ran called it"


def test_other_tests_are_left_in_peace(pytester, at_a_desk):
    pytester.makepyfile(test_other="import sys\ndef test_other():\n    assert 'torch' not in sys.modules\n")
    result = pytester.runpytest_subprocess("-p", "headoff.harness.plugin.hooks")
    result.assert_outcomes(passed=1)
    assert not any(line.strip("= ") == "headoff" for line in result.outlines)


def test_the_suites_have_the_name_to_themselves():
    """`-k heads_off` reads their files alone: a test of that name elsewhere would never be run by it."""
    import re
    from pathlib import Path

    others = [
        path
        for path in Path(__file__).parent.glob("test_*.py")
        if not path.name.startswith("test_heads_off_")
    ]
    named = {
        path.name for path in others if re.search(r"^def test_\w*heads_off", path.read_text(), re.MULTILINE)
    }
    # Suites within these two are text, for a pytest of their own.
    assert named == {"test_harness_golden.py", "test_harness_plugin.py"}
