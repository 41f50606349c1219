"""The syrupy extension for relevance maps, in suites of its own."""

from __future__ import annotations

import re

import pytest
import syrupy
from PIL import Image

# Here already, not in the suites: they forget what they import, and torch cannot be imported twice.
import headoff.harness.reference.golden  # noqa: F401

pytest_plugins = ["pytester"]

SUITE = """
import numpy as np
import pytest

from headoff.harness.reference.golden import GoldenMaps
from headoff.harness.reference.maps import CaseMaps
from headoff.harness.tolerance import Tolerance

true = np.random.default_rng(0).random((2, 3, 4, 5)) + 1
true[:, 0] *= 1e-8  # dying


def case(maps, **changes):
    return CaseMaps(**{
        "case": "scene-7, first 1 off",
        "maps": maps,
        "objects": ("query 3 (cup)", "query 5 (star)"),
        "inputs": {"weights": "0" * 64, "image": "1" * 64},
        "tolerance": Tolerance(1e-6, 4 * 2**-23),
        "found_by": "a kernel",
        **changes,
    })


@pytest.fixture
def golden(snapshot):
    return snapshot.use_extension(GoldenMaps)
"""

ORACLE = """
def test_heads_off_truth(golden):
    got = true.copy()
    {change}
    assert golden == case(got)
"""


@pytest.fixture
def run(pytester, at_a_desk):
    """`run(tests, *options)` runs a suite of those tests."""
    folder = pytester.mkdir("tests")

    def run_suite(tests: str, *options: str) -> pytest.RunResult:
        (folder / "test_suite.py").write_text(SUITE + tests)
        # syrupy keeps the running session in a global: give the outer one its own back.
        outer = syrupy._syrupy
        try:
            return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist", *options)
        finally:
            syrupy._syrupy = outer

    return run_suite


@pytest.fixture
def golden_file(pytester):
    return pytester.path / "golden" / "test_suite" / "test_heads_off_truth.npz"


def oracle(change: str = "pass") -> str:
    return ORACLE.format(change=change)


def test_update_writes_what_is_missing(run, golden_file):
    missing = run(oracle())
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*does not exist!*", "*run `pytest -k heads_off --snapshot-update`*"])
    assert not golden_file.exists()
    run(oracle(), "--snapshot-update").assert_outcomes(passed=1)
    assert golden_file.is_file()
    run(oracle()).assert_outcomes(passed=1)


def test_within_tolerance_passes_and_update_leaves_the_file(run, golden_file):
    run(oracle(), "--snapshot-update")
    before = golden_file.read_bytes()
    slight = oracle("got[1, 0, 2, 2] *= 1 + 2e-6; got[0, 2] *= 1 - 1e-6")
    run(slight).assert_outcomes(passed=1)
    run(slight, "--snapshot-update").assert_outcomes(passed=1)
    assert golden_file.read_bytes() == before


@pytest.mark.parametrize("layer", [0, 2])
def test_a_changed_map_fails_with_numbers_and_a_picture(run, golden_file, pytester, layer):
    """However small the map is as a whole."""
    run(oracle(), "--snapshot-update")
    failed = run(oracle(f"got[1, {layer}, 2, 4] *= 1.01"))
    failed.assert_outcomes(failed=1)
    failed.stdout.fnmatch_lines(
        [
            "*scene-7, first 1 off: 1 of 6 maps by a kernel are not the expected ones",
            f"*query 5 (star), after layer {layer}: off by *e-0* of the peak, at token (2, 4) *, expected *; mass *",
            "*allowed of a map's peak are 4.5e-06: 4 times the 1.0e-06 that right implementations are off by, plus *",
            "*expected | found | difference of the worst: *.png",
        ]
    )
    (path,) = re.findall(r"of the worst: (.*\.png)", failed.stdout.str())
    assert path.startswith(str(pytester.path / "build" / "golden-failures"))
    with Image.open(path) as picture:
        width, height = picture.size
        assert width > 2 * height, "three panels in a row"
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_update_replaces_a_changed_map(run, golden_file):
    run(oracle(), "--snapshot-update")
    before = golden_file.read_bytes()
    changed = oracle("got[1, 1] *= 2")
    run(changed, "--snapshot-update").assert_outcomes(passed=1)
    assert golden_file.read_bytes() != before
    run(changed).assert_outcomes(passed=1)


@pytest.mark.parametrize("value", ["np.nan", "np.inf"])
def test_what_is_not_finite_fails(run, value):
    run(oracle(), "--snapshot-update")
    failed = run(oracle(f"got[0, 1, 0, 0] = {value}"))
    failed.assert_outcomes(failed=1)
    failed.stdout.fnmatch_lines(
        ["*query 3 (cup), after layer 1: 1 of 20 numbers are NaN or infinite", "*.png"]
    )


def test_other_weights_are_reported(run):
    """Whatever the maps are: they cannot be compared."""
    run(oracle(), "--snapshot-update")
    stale = run(
        oracle().replace("case(got)", 'case(2 * got, inputs={"weights": "2" * 64, "image": "1" * 64})')
    )
    stale.assert_outcomes(failed=1)
    stale.stdout.fnmatch_lines(
        [
            "*golden made with other weights (sha256 000000000000, now sha256 222222222222): "
            "run `pytest -k heads_off --snapshot-update`"
        ]
    )
    stale.stdout.no_fnmatch_line("*.png")


def test_other_objects_are_reported(run):
    run(oracle(), "--snapshot-update")
    other = run(oracle().replace("case(got)", 'case(got, objects=("query 3 (cup)", "query 6 (ring)"))'))
    other.assert_outcomes(failed=1)
    other.stdout.fnmatch_lines(
        ["*explained are query 3 (cup), query 6 (ring), expected query 3 (cup), query 5 (star): run *"]
    )


@pytest.mark.parametrize("options", [[], ["-k", "heads_off"]])
def test_orphans_are_found_and_removed(run, golden_file, options):
    """In a run of everything, and in the run that the suites are made for."""
    run(oracle(), "--snapshot-update")
    renamed = oracle().replace("heads_off_truth", "heads_off_truth_of_another")
    assert run(renamed, "--snapshot-update", "--snapshot-no-cleanup").ret == 0
    orphaned = run(renamed, *options)
    assert orphaned.ret != 0
    orphaned.stdout.fnmatch_lines(["*1 snapshot unused*"])
    run(renamed, "--snapshot-update", *options)
    assert not golden_file.exists()
    assert run(renamed, *options).ret == 0


def test_skipped_cases_keep_their_golden_files(run, golden_file):
    """As those of a device that is not there."""
    run(oracle(), "--snapshot-update")
    skipped = oracle().replace("def ", "@pytest.mark.skip(reason='no such device')\ndef ", 1)
    other = oracle().replace("heads_off_truth", "heads_off_other")
    for options in ([], ["--snapshot-update"], ["--snapshot-update", "-k", "heads_off"]):
        run(skipped + other, "--snapshot-update", *options)
        assert golden_file.exists()
