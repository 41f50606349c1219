"""The images that a suite is run on."""

from __future__ import annotations

import pytest

from headoff.harness.plugin.options import settings_from


def parametrize_scenes(metafunc: pytest.Metafunc, **counts: int | None) -> None:
    """Parametrize fixtures, where a test has them, by the names of reference cases.

    Args:
        counts: by the fixture, how many of the first images it stands for; None for all.
    """
    wanted = {name: count for name, count in counts.items() if name in metafunc.fixturenames}
    if wanted:
        from headoff.harness.reference.cases import case_names

        names = case_names(settings_from(metafunc.config))
        for name, count in wanted.items():
            metafunc.parametrize(name, names[:count])
