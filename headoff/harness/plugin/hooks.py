"""The pytest plugin: options, the fixture `under_test`, and the verdict at the end of a run.

pytest loads it wherever headoff is installed, so it imports torch only when a test asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from headoff.errors import HeadoffError
from headoff.files import clear_marked_folder
from headoff.harness.contracts import CHECKS_SUITE, is_under_test
from headoff.harness.plugin.benchmark_hooks import (
    pytest_benchmark_compare_machine_info,
    pytest_benchmark_update_json,
    pytest_terminal_summary,
)
from headoff.harness.plugin.options import add_options, add_short_names, all_settings, text_of, value_of
from headoff.harness.plugin.reporter import Reporter, is_suite
from headoff.harness.plugin.run import suite_of
from headoff.harness.plugin.scenes import parametrize_scenes
from headoff.harness.process import is_watched
from headoff.harness.settings import OPTIONS

if TYPE_CHECKING:
    from headoff.harness.plugin.patch import Patch
    from headoff.harness.settings import Settings

__all__ = [  # hooks that are written elsewhere
    "pytest_benchmark_compare_machine_info",
    "pytest_benchmark_update_json",
    "pytest_terminal_summary",
]

REPORTER = pytest.StashKey[Reporter]()
CLEARED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser) -> Generator[None]:
    result = yield
    add_short_names(parser)
    return result


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "oracle: of the harness's own oracle; it never calls the attention")
    with one_clear_error():
        report = value_of(config, "report")
        if report and not is_worker(config) and not is_watched():
            from headoff.harness.report import remove_earlier_report

            remove_earlier_report(report)
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
    if any(text_of(config, option.name) for option in OPTIONS):
        with one_clear_error():
            all_settings(config)
    # With workers this process collects no tests. Each worker would report a patch that cannot be called.
    if config.getoption("numprocesses", None) and text_of(config, "attention"):
        check_patch(config)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the suites of the other contract, which would call the attention with what it does not take, those
    of other models or of a backward pass that is not under test, and checks that were not asked for.
    """
    suites = {item: suite_of(item.nodeid) for item in items if is_suite(item.path)}
    if not suites:
        return
    with one_clear_error():
        settings = all_settings(config)[0]
        is_of_family = settings.model_choice.is_of_family()
    others = {
        item
        for item, suite in suites.items()
        if not is_under_test(suite, settings.of_contract, is_of_family, settings.forward_only)
        or (suite == CHECKS_SUITE and not _is_asked_for(item, settings))
    }
    if others:
        config.hook.pytest_deselected(items=list(others))
        items[:] = [item for item in items if item not in others]


def _is_asked_for(item: pytest.Item, settings: Settings) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("check") in settings.checks


def pytest_collection_finish(session: pytest.Session) -> None:
    if (
        not is_worker(session.config)
        and not session.config.option.collectonly
        and any("under_test" in getattr(item, "fixturenames", ()) for item in session.items)
    ):
        check_patch(session.config)
        clear_failures(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    # Workers run no test before all of them have collected; one that is started again collects again.
    if any(is_suite(Path(test.partition("::")[0])) for test in ids):
        clear_failures(node.config)


def clear_failures(config: pytest.Config) -> None:
    """Remove an earlier run's pictures, once, in runs that may draw others."""
    if not config.stash.get(CLEARED, False):
        config.stash[CLEARED] = True
        clear_marked_folder(value_of(config, "failures"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "under_test" not in metafunc.fixturenames:
        return
    with one_clear_error():
        settings = all_settings(metafunc.config)
        parametrize_scenes(metafunc, scene=None)
    # Golden files are named by tests, and are of the oracle, whatever the dtype of the patch.
    if len(settings) > 1 and "snapshot" not in metafunc.fixturenames:
        metafunc.parametrize("under_test", settings[0].dtypes, indirect=True, scope="session")


@pytest.fixture(scope="session")
def under_test(request: pytest.FixtureRequest) -> Patch:
    """The attention under test (`.attention`), with the device, dtype and seed to test it with.

    With several `--dtype`, tests run once for each.
    """
    import torch

    config = request.config
    if is_worker(config):
        # Workers share the cores; threads of several would wait for one another most of the time.
        workers = config.workerinput["workercount"]  # type: ignore[attr-defined]
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    settings = {one.dtype: one for one in all_settings(config)}
    return config.stash[REPORTER].patch_of(settings[getattr(request, "param", next(iter(settings)))])


def check_patch(config: pytest.Config) -> None:
    """End the run, with one sentence, for a setting or a patch that nothing can be tested with."""
    from headoff.harness.plugin.preflight import preflight_all

    with one_clear_error():
        preflight_all(all_settings(config))


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
