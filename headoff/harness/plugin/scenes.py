"""The images that a suite is run on, and what golden files say of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from headoff.harness.plugin.options import settings_from

if TYPE_CHECKING:
    from headoff.detections import Detections
    from headoff.harness.reference.golden import GoldenFile

STALE = "the golden file is stale: run `pytest -k heads_off --snapshot-update`"


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


def golden_files(snapshot: Any, folder: Path | None, kind: type[GoldenFile]) -> Any:
    """syrupy's `snapshot` with the golden files in `folder`; skips the test where there are none (`folder` is None).

    To be called before anything is computed, and compared in the test itself, as `golden == expected`: pytest shows
    how they differ.
    """
    from headoff.harness.reference.golden import in_folder

    if folder is None:
        pytest.skip(
            "there are no golden files for this model and image: the oracle's output is what is expected"
        )
    return snapshot.use_extension(in_folder(folder, kind))


def golden_detections(confidence: float, found: Mapping[str, Detections]) -> dict[str, Any]:
    """The contents of a golden file of detections, from those under each configuration."""
    from headoff.harness.reference.golden import detection_rows

    height, width = next(iter(found.values())).image_size
    return {
        "confidence": confidence,
        "image_size": [height, width],
        "configurations": {name: detection_rows(detections) for name, detections in found.items()},
    }
