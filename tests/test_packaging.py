"""A wheel has the suites and golden files in it, and `headoff verify` runs them from there."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import headoff

pytest.importorskip("hatchling", reason="a wheel is built: pip install hatchling")
ROOT = Path(headoff.__file__).parents[1]

WITHOUT_EXTRAS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        missing = {"faster_coco_eval", "nbclient", "pandas", "pycocotools", "scipy", "transformers"}
        missing |= {"pyarrow", "ray", "starlette", "uvicorn"}
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
"""A sitecustomize.py: the plain install has no package of the extras. (Plugins of pytest are loaded by pytest.)"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    return Path(next(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))


def test_suites_and_golden_files_are_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    golden = {f"headoff/suites/{path.relative_to(ROOT)}" for path in (ROOT / "golden").rglob("*.*")}
    suites = {f"headoff/suites/tests/{path.name}" for path in (ROOT / "tests").glob("test_heads_off_*.py")}
    assert len(golden) > 90 and golden <= names
    assert suites <= names
    assert not any("mutants" in name or "test_gates" in name for name in names), (
        "tests of the project itself stay at home"
    )
    assert {"headoff/__init__.pyi", "headoff/py.typed", "headoff/scenes/weights/scenes.safetensors"} <= names
    assert any(name.startswith("headoff/harness/report/templates/") for name in names)
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "[pytest11]\nheadoff.harness.plugin" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_an_installed_headoff_verifies(wheel, tmp_path, at_a_desk):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(installed)
    (installed / "sitecustomize.py").write_text(WITHOUT_EXTRAS)
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(installed), "HEADOFF_CACHE": str(tmp_path / "cache")}
    program = "import sys, headoff.cli; print(headoff.__file__); sys.exit(headoff.cli.main())"
    done = subprocess.run(
        # One scene will do: what is tested is that the suites and their golden files are found.
        [sys.executable, "-c", program, "verify", "sdpa", "--only", "detections", "--", "-k", "scene-000"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(installed) in done.stdout and "sdpa is right" in done.stdout
    assert not list(elsewhere.iterdir()), "nothing is left where it ran"
    for action, needs in (
        (["scenes", "train"], "training needs scipy: pip install 'headoff[scenes]'"),
        (["scenes", "evaluate"], "detections are stored by pyarrow: pip install 'headoff[evaluate]'"),
        (["live"], "are not installed: pip install 'headoff[live]'"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *action],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 2 and needs in done.stderr


def test_pytest_finds_the_suites_of_an_installed_headoff(wheel, tmp_path, at_a_desk):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    plugin = ["-p", "headoff.harness.plugin.hooks", "-p", "no:cacheprovider"]  # no entry point without pip
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            os.devnull,
            *plugin,
            "--pyargs",
            "headoff.suites",
            "-k",
            "heads_off_calls",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sdpa is right: 1 check passed" in done.stdout and str(tmp_path / "installed") in done.stdout
