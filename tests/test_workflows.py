"""Workflows of this repository and those for others to copy: what can be known of them without running them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from page_examples import document

from headoff import cli

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
OURS = sorted(ROOT.glob(".github/workflows/*.yml"))
THEIRS = sorted(ROOT.glob("docs/ci/*.yml"))
GUIDE = ROOT / "docs" / "ci.md"

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")


def load(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    # YAML 1.1 takes the key `on` for true.
    return {("on" if key is True else key): value for key, value in workflow.items()}


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def scripts(workflow):
    return [step["run"] for step in steps(workflow) if "run" in step]


def step_named(workflow, name):
    (step,) = [step for step in steps(workflow) if step.get("name") == name]
    return step


def commands(text):
    """The calls of `headoff` in a script, as lists of words."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in map(str.strip, lines) if line.startswith("headoff ")]


def every(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)


def test_they_are_there():
    assert [path.name for path in OURS] == ["ci.yml", "mutation.yml"]
    assert [path.name for path in THEIRS] == ["headoff-cpu.yml", "headoff-gpu.yml"]


@every(OURS + THEIRS)
def test_little_is_permitted_and_nothing_runs_for_ever(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "${{ github.ref }}" in workflow["concurrency"]["group"]
    assert "pull_request_target" not in workflow["on"]
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 60
        assert "permissions" not in job
    for step in steps(workflow):
        assert not step.get("continue-on-error")
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@every(OURS + THEIRS)
def test_no_expression_is_pasted_into_a_script(path):
    workflow = load(path)
    assert scripts(workflow)
    for script in scripts(workflow):
        assert "${{" not in script
        # Unquoted, a variable's text would be split and expanded.
        assert not re.search(r"\$\w+", re.sub(r'"[^"\n]*"', "", script))


@needs_bash
@every(OURS + THEIRS)
def test_scripts_are_bash(path):
    for script in scripts(load(path)):
        subprocess.run(["bash", "-n", "-c", script], check=True)


@every(THEIRS)
def test_variables_of_scripts_are_set(path):
    workflow = load(path)
    for script in scripts(workflow):
        for name in re.findall(r"\$(\w+)", script):
            assert name in workflow["env"] or name.startswith(("GITHUB_", "RUNNER_")), name


@every(THEIRS)
def test_the_patch_is_an_input_with_the_same_default_for_pull_requests(path):
    workflow = load(path)
    inputs = workflow["on"]["workflow_dispatch"]["inputs"]
    assert workflow["on"]["pull_request"]["paths"]
    for name in inputs.keys() - {"runner"}:
        expected = f"${{{{ inputs.{name} || '{inputs[name]['default']}' }}}}"
        assert workflow["env"][name.upper()] == expected
    assert "${{ inputs.attention" in workflow["env"]["ATTENTION"]
    assert f".github/workflows/{path.name}" in workflow["on"]["pull_request"]["paths"]


@every(THEIRS)
def test_results_are_kept_after_a_failure_too(path):
    workflow = load(path)
    (words,) = commands(step_named(workflow, "Verify")["run"])
    report = words[words.index("--report") + 1]
    junit = words[words.index("--junitxml") + 1]
    kept = step_named(workflow, "Keep the report")
    assert kept["if"] == step_named(workflow, "Summary")["if"] == "${{ !cancelled() }}"
    assert set(kept["with"]["path"].split()) == {report, report.replace(".html", ".json"), junit}


def test_a_fork_does_not_reach_the_gpu_and_only_there_it_is_timed():
    cpu, gpu = map(load, THEIRS)
    (job,) = gpu["jobs"].values()
    assert "github.event.pull_request.head.repo.full_name == github.repository" in job["if"]
    default = re.search(r"'(\[.*\])'", job["runs-on"])
    assert json.loads(default[1]) == ["self-hosted", "linux", "gpu"]
    timed = [any("--benchmark" in words for words in commands("\n".join(scripts(one)))) for one in (cpu, gpu)]
    assert timed == [False, True]


@every(THEIRS)
def test_what_is_installed_has_all_that_the_suites_need(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert load(path)["env"]["HEADOFF"] == project["name"]
    required = {re.match(r"[\w-]+", one)[0] for one in project["dependencies"]}
    assert {"pytest", "pytest-benchmark", "syrupy", "jinja2"} <= required


@needs_bash
@every(THEIRS)
def test_the_summary_is_written_with_a_report_and_without(path, tmp_path):
    script = step_named(load(path), "Summary")["run"]
    # A `headoff` that only renders, in place of the command.
    rendering = "import sys; from headoff.harness.report import render_file; render_file(*sys.argv[3:])"
    command = tmp_path / "bin" / "headoff"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(rendering)} "$@"\n')
    command.chmod(0o755)
    target = tmp_path / "summary"
    environment = {
        **os.environ,
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_STEP_SUMMARY": str(target),
    }
    told = []
    for contents in (None, document("slower")):
        if contents is not None:
            (tmp_path / "headoff-report.json").write_text(json.dumps(contents))
        subprocess.run(["bash", "-eo", "pipefail", "-c", script], cwd=tmp_path, env=environment, check=True)
        told.append(target.read_text(encoding="utf-8"))
    assert told[0].startswith("No verdict")
    assert told[1].startswith(told[0]) and "1.71 times as long" in told[1]


def has_verify():
    try:
        cli.parser().parse_args(["verify", "--help"])
    except SystemExit as end:
        return end.code == 0
    return False


@every([*THEIRS, GUIDE])
def test_commands_are_those_of_the_command_line(path, capsys):
    if not has_verify():
        pytest.skip("this version has no `headoff verify`")
    values = {"$ATTENTION": "sdpa", "$MODEL": "scenes", "$MAX_SLOWDOWN": "1.10"}
    text = path.read_text(encoding="utf-8") if path == GUIDE else "\n".join(scripts(load(path)))
    found = commands(text)
    assert found
    for words in found:
        try:
            cli.parser().parse_args([values.get(word, word) for word in words])
        except SystemExit:
            pytest.fail(f"headoff {shlex.join(words)}: {capsys.readouterr().err}")


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@every(PAGES)
def test_links_and_file_names_of_our_pages_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    names = re.findall(r"`((?:headoff|tests|tools|docs|golden)/[\w/.]+)`", text)
    for target in links + names:
        assert (path.parent / target).exists() or (ROOT / target).exists(), target


def test_our_ci_runs_what_the_readme_says():
    workflow = load(OURS[0])
    assert "pip install tox && tox" in scripts(workflow)
    assert "pip install tox && tox" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert workflow["jobs"]["tox"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
