"""Settings of every test run."""

import os
from pathlib import Path

import pytest
import torch

import headoff
from headoff.harness.plugin.options import add_short_names
from headoff.timing import torch_threads


def pytest_ignore_collect(collection_path, config):
    """With `-k heads_off`, read the suites alone: the other forty files take longer than many of their tests."""
    chosen = config.option.keyword
    if chosen.startswith("heads_off") and " or " not in chosen and collection_path.name.startswith("test_"):
        return True if not collection_path.name.startswith("test_heads_off_") else None
    return None


def pytest_addoption(parser):
    # What the plugin does by itself where it is installed.
    add_short_names(parser)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, a worker gets neighbouring tests: these share models, expected results, fixtures and reports.

    By default pytest-xdist deals tests out, and every worker computes what they share. `--dist` still has its way.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


pytest_plugins = ["headoff.harness.plugin.hooks"]  # where headoff is not installed and has no entry point

if Path(headoff.__file__).parents[1] != Path(__file__).parent:
    pytest.exit(
        f"headoff was imported from {Path(headoff.__file__).parent}, not from this checkout: run `pip install -e .`",
        returncode=4,
    )


@pytest.fixture
def at_a_desk(monkeypatch):
    """Runs of pytest within a test see no CI, no worker of pytest-xdist and no options of the run they are part of.

    In a worker pytest-benchmark times nothing and syrupy leaves its report to the controller; CI makes pytest say
    everything twice.
    """
    for name in ("CI", "BUILD_NUMBER", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def blank_figures(monkeypatch):
    """Figures are laid out and saved but not painted, which takes most of a report's time.

    For tests of all that is not in the pictures.
    """
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "draw", lambda self, renderer: None)


@pytest.fixture
def one_thread():
    """For tests whose tensors are so small that threads would only wait for each other."""
    with torch_threads(1):
        yield


# Two workers of two threads each on two cores wait for each other most of the time, and so do the processes that
# tests in a worker start: these read the variable. A run without workers has the threads that torch chooses.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
