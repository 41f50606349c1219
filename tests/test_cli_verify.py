"""`headoff verify`: exit codes, one sentence for what cannot be, reports, and where it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import headoff
from headoff import cli
from headoff.harness import suite_files as shipped

KERNEL = """
import torch
from torch.nn.functional import scaled_dot_product_attention

def attention(query, key, value, attn_mask=None):
    return scaled_dot_product_attention(query, key, value, attn_mask)

def falls_back(query, key, value, attn_mask=None):
    try:
        raise RuntimeError("no kernel for this shape")
    except RuntimeError:
        return attention(query, key, value, attn_mask)

def crashing(query, key, value, attn_mask=None):
    raise ValueError("out of luck")

def inference(query, key, value, attn_mask=None):
    if query.requires_grad:
        raise RuntimeError("inference only")
    return falls_back(query, key, value, attn_mask)

calls = 0

def ends_its_process(query, key, value, attn_mask=None):
    global calls
    calls += 1
    if calls > 12:
        __import__("os")._exit(0)
    return attention(query, key, value, attn_mask)
"""

MSDA = """
from headoff.deformable import gather_attention

def kernel(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
    return gather_attention(value, spatial_shapes, sampling_locations, attention_weights, head_gate=head_gate)

def swapped(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
    return kernel(value, spatial_shapes, sampling_locations.flip(-1), attention_weights, head_gate=head_gate)
"""

ENDLESS = "while True: pass\n"


@pytest.fixture
def folder(tmp_path, monkeypatch, at_a_desk):
    """A project of somebody's own, with settings for pytest that are not to count."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kernel.py").write_text(KERNEL)
    (tmp_path / "msda.py").write_text(MSDA)
    (tmp_path / "endless.py").write_text(ENDLESS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    (tmp_path / "conftest.py").write_text("raise RuntimeError('this is not to be read')\n")
    return tmp_path


def verify(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: pytest within pytest shares more than it should."""
    environment = os.environ | {
        "HEADOFF_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(Path(headoff.__file__).parents[1]),
        "PYTEST_ADDOPTS": "--no-such-option",
    }
    program = "import sys, headoff.cli; sys.exit(headoff.cli.main())"
    return subprocess.run(
        [sys.executable, "-c", program, "verify", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_right_from_any_folder(folder):
    done = verify(
        folder, "kernel.py:attention", "--only", "calls", "--report", "out.html", "--junitxml", "out.xml"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernel.py:attention is right: 1 check passed" in done.stdout
    document = json.loads((folder / "out.json").read_text())
    assert document["verdict"] == "right" and document["about"]["attention"] == "kernel.py:attention"
    assert "kernel.py:attention is right" in (folder / "out.html").read_text()
    assert 'tests="1"' in (folder / "out.xml").read_text()
    left = {path.name for path in folder.iterdir()} - {"__pycache__", "cache"}
    assert left == {
        "kernel.py",
        "msda.py",
        "endless.py",
        "pytest.ini",
        "conftest.py",
        "out.html",
        "out.json",
        "out.xml",
    }


def test_wrong_and_options_of_pytest(folder):
    done = verify(folder, "kernel.py:falls_back", "--only", "calls", "--", "-x", "--tb=short")
    assert done.returncode == 1, done.stdout + done.stderr
    said = [
        line for line in done.stdout.splitlines() if line.startswith("kernel.py:falls_back is wrong: calls: ")
    ]
    assert said and "RuntimeError: no kernel for this shape (line 10)" in said[0]
    assert "\nheadoff: the first check that fails says: calls: " in done.stderr
    assert "FAILURES" in done.stdout


def test_deformable_attention(folder):
    some = ("--", "-k", "flat or tall or first-0")
    done = verify(folder, "msda.py:kernel", "--contract", "deformable", *some)
    assert done.returncode == 0 and "msda.py:kernel is right: 3 checks passed" in done.stdout, done.stderr
    assert "the first check that fails" not in done.stderr
    done = verify(folder, "msda.py:swapped", "--contract", "deformable", "--report", "out.html", *some)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "swapped is wrong: sampling: x and y of the sampling locations are swapped" in done.stdout
    about = json.loads((folder / "out.json").read_text())["about"]
    assert about["contract"] == "deformable" and about["baseline"] == "grid_sample" and "model" not in about


def test_leaves_out_what_says_nothing_of_the_attention(folder):
    listed = verify(folder, "kernel.py:attention", "--", "--collect-only", "--trace-config").stdout
    assert "test_expected_importance" in listed and "test_oracle" not in listed
    assert "syrupy" in listed and "hypothesis" not in listed
    every = verify(folder, "kernel.py:attention", "--", "--collect-only", "-m", "oracle").stdout
    assert (
        "test_oracle[scene-000]" in every and "test_heads_off_truth" in every and "test_expected" not in every
    )


@pytest.mark.parametrize("options", [(), ("-n", "1")])
def test_an_attention_that_ends_its_process_has_no_verdict(folder, options):
    done = verify(folder, "kernel.py:ends_its_process", "--only", "calls", "--report", "out.json", *options)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "no verdict, because" in line]
    assert len(lines) == 1 and "test_heads_off_calls" in lines[0], done.stdout
    assert (
        "ended the process of a worker" if options else "ended its process with exit code 0 during"
    ) in lines[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert (
        not (folder / "out.json").exists()
        or json.loads((folder / "out.json").read_text())["verdict"] == "incomplete"
    )


def test_an_import_that_does_not_end_is_ended(folder):
    done = verify(folder, "endless.py:attention", "--timeout", "1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no verdict, because it did not come back from its import within 1 s" in done.stdout


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "nothing to verify was named"),
        (
            ("kernel.py:crashing",),
            "kernel.py:crashing raised ValueError: out of luck ({folder}/kernel.py, line 15)",
        ),
        (("kernel.py:atention",), "did you mean 'attention'?"),
        (("kernel.py:attention", "--only", "spelling"), "there is no suite 'spelling': name one of "),
        (("kernel.py:attention", "--device", "abacus"), "device 'abacus' cannot be used here"),
        (("kernel.py:attention", "--report", "report.pdf"), "give a name that ends in .html or .json"),
        (("kernel.py:attention", "-n", "2", "--benchmark"), "times need the machine to themselves"),
        (
            ("kernel.py:attention", "--contract", "deformabel"),
            "no contract 'deformabel' (did you mean 'deformable'?)",
        ),
        (
            ("msda.py:kernel", "--contract", "deformable", "--only", "operator"),
            "the suite 'operator' is for --contract dense: name one of deformable, family, "
            "checks, deformable_benchmark",
        ),
        (("msda.py:kernel",), "msda.py:kernel takes sampling_locations: add --contract deformable"),
        (("kernel.py:inference",), "add --forward-only to have its forward pass tested alone"),
        (("kernel.py:attention", "--only", "checks"), "runs what --check names: add --check compile"),
        (("kernel.py:attention", "--check", "compil"), "no check 'compil' (did you mean 'compile'?)"),
        (("--render", "nothing.json", "page.html"), "nothing.json"),
    ],
)
def test_what_cannot_be_is_one_sentence(folder, capsys, arguments, said):
    assert cli.main(["verify", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (
        said.format(folder=folder) in err
        and err.startswith("headoff: error: ")
        and err.count("\n") == 1
        and not out
    )
    assert not (folder / "page.html").exists()


def test_why_there_is_no_verdict_is_in_the_report(folder):
    done = verify(folder, "kernel.py:crashing", "--report", "out.html")
    assert done.returncode == 2 and "raised ValueError: out of luck" in done.stderr
    document = json.loads((folder / "out.json").read_text())
    assert document["verdict"] == "incomplete" and "raised ValueError: out of luck" in document["headline"]
    assert "raised ValueError: out of luck" in (folder / "out.html").read_text()


def test_every_suite_is_there_and_goes_into_the_wheel():
    import tomllib

    root = Path(headoff.__file__).parents[1]
    assert shipped.suites_folder() == root
    project = tomllib.loads((root / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    files = {f"tests/{path.name}" for path in (root / "tests").glob(shipped.PATTERN)}
    assert {name for name in included if name.startswith("tests/")} == files
    assert all(target == f"headoff/suites/{source}" for source, target in included.items())


def test_the_example_of_the_readme_is_right(tmp_path):
    import torch

    from headoff.attention import resolve_attention
    from headoff.harness.operator import SIDE_EFFECTS, operator_findings, reduced_cases, side_effect_findings

    readme = (Path(headoff.__file__).parents[1] / "README.md").read_text()
    section = readme[readme.index("## For kernel engineers") :]
    code = section.split("```python\n")[1].split("```")[0]
    file = tmp_path / "my_kernel.py"
    file.write_text(code)
    attention = resolve_attention(f"{file}:attention")
    for case in reduced_cases(torch.float32):
        assert not operator_findings(attention, case, "cpu")
    for check in SIDE_EFFECTS:
        assert not side_effect_findings(attention, check, torch.float32, "cpu")


def test_a_forward_pass_with_a_fallback_that_is_declared_and_checks(folder):
    options = ("--forward-only", "--only", "calls", "--check", "opcheck,autocast", "--report", "out.json")
    ended = verify(folder, "kernel.py:inference", *options, "--allow-fallback", "exception")
    assert ended.returncode == 0, ended.stderr
    assert "kernel.py:inference (forward pass only) is right: 2 checks passed" in ended.stdout
    document = json.loads((folder / "out.json").read_text())
    assert document["about"]["passes"] == "forward only"
    notes = "\n".join(document["notes"])
    assert "a fallback that is intended (--allow-fallback): called as in encoder_self, it raised" in notes
    assert "the check opcheck is not applicable: it calls no custom operator" in notes
    assert [test["outcome"] for test in document["tests"]].count("skipped") == 1
