"""The public names of `headoff`, which are imported when they are first used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import headoff

ROOT = Path(headoff.__file__).parents[1]


def in_a_new_process(program: str) -> str:
    """What `program` prints."""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return run.stdout


def test_every_public_name_is_there():
    assert {"load", "sweep", "explain", "cumulative", "stack", "Detector", "HeadoffError"} <= set(
        headoff.__all__
    )
    for name in headoff.__all__:
        assert getattr(headoff, name) is not None
        assert name in dir(headoff)


def test_a_public_name_is_its_modules_object():
    assert headoff.gates.first_off is headoff.first_off
    assert headoff.errors.GateError is headoff.GateError


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="sweeep"):
        headoff.sweeep  # noqa: B018


def test_importing_one_name_leaves_the_rest_alone():
    program = "import sys; from headoff import HeadoffError; print('torch' in sys.modules)"
    assert in_a_new_process(program) == "False\n"


@pytest.mark.parametrize("module", ["headoff", "headoff.harness.plugin.hooks"])
def test_torch_and_matplotlib_are_not_imported(module):
    program = f"import sys, {module}; print({{'torch', 'matplotlib'}} & set(sys.modules))"
    assert in_a_new_process(program) == "set()\n"
