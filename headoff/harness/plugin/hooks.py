"""The pytest plugin: options, the fixture `under_test`, and what is said at the end of a run.

pytest loads it wherever headoff is installed, so it imports torch only when a test asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from headoff.errors import HeadoffError
from headoff.harness.plugin.benchmark_hooks import (
    pytest_benchmark_compare_machine_info,
    pytest_benchmark_update_json,
    pytest_terminal_summary,
)
from headoff.harness.plugin.options import add_options, add_short_names, settings_from, value_of, was_chosen
from headoff.harness.plugin.reporter import Reporter, make_way, tests_the_patch

if TYPE_CHECKING:
    from headoff.harness.plugin.patch import Patch

__all__ = [  # hooks that are written elsewhere
    "pytest_benchmark_compare_machine_info",
    "pytest_benchmark_update_json",
    "pytest_terminal_summary",
]

REPORTER = pytest.StashKey[Reporter]()


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser) -> Generator[None]:
    result = yield
    add_short_names(parser)
    return result


def pytest_configure(config: pytest.Config) -> None:
    report = value_of(config, "report")
    if report and not is_worker(config):
        with one_clear_error():
            make_way(Path(report))
    reporter = Reporter(config, worker=is_worker(config))
    config.stash[REPORTER] = reporter
    config.pluginmanager.register(reporter, "headoff-reporter")


def pytest_report_header(config: pytest.Config) -> str:
    import headoff

    attention = value_of(config, "attention")
    return f"headoff: {headoff.__version__} of {Path(headoff.__file__).parent}, attention {attention}"


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    if is_worker(config):
        return
    if any(was_chosen(config, name) for name in ("device", "dtype", "image", "seed", "max-slowdown")):
        with one_clear_error():
            settings_from(config)
    # With workers this process never sees a test, and a patch that cannot be used is to be refused once, not by each.
    if config.getoption("numprocesses", None) and was_chosen(config, "attention"):
        take_off(config)


def pytest_collection_finish(session: pytest.Session) -> None:
    if (
        not is_worker(session.config)
        and not session.config.option.collectonly
        and any(map(tests_the_patch, session.items))
    ):
        take_off(session.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"scene", "under_test"} <= set(metafunc.fixturenames):
        from headoff.harness.reference.cases import names

        with one_clear_error():
            metafunc.parametrize("scene", names(settings_from(metafunc.config)))


@pytest.fixture(scope="session")
def under_test(pytestconfig: pytest.Config) -> Patch:
    """The attention under test (`.attention`), with the device, dtype and seed to test it with."""
    import torch

    from headoff.harness.plugin.patch import Patch

    if is_worker(pytestconfig):
        # Workers share the cores; threads of several would wait for one another most of the time.
        workers = pytestconfig.workerinput["workercount"]  # type: ignore[attr-defined]
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    patch = Patch.of(settings_from(pytestconfig))
    pytestconfig.stash[REPORTER].patch = patch
    return patch


def take_off(config: pytest.Config) -> None:
    """Refuse, with one sentence, a patch or a setting that nothing can be tested with."""
    from headoff.harness.plugin.preflight import preflight

    with one_clear_error():
        settings = settings_from(config)
        preflight(settings.attention, settings.device, settings.dtype)


@contextmanager
def one_clear_error() -> Iterator[None]:
    """pytest prints a usage error as a line, and ends."""
    try:
        yield
    except HeadoffError as error:
        raise pytest.UsageError(f"headoff: {error}") from None


def is_worker(config: pytest.Config) -> bool:
    """Whether this process runs tests for another one, which reports them (pytest-xdist)."""
    return hasattr(config, "workerinput")
