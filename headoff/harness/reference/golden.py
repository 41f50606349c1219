"""syrupy extensions for golden files, under `golden/`.

Read with syrupy's `golden == value` (never `value == golden`). Written by `--snapshot-update` only, and only by
tests that run the float64 oracle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode
from syrupy.location import PyTestLocation

from headoff.harness.reference.expected import BOX_DECIMALS, SCORE_DECIMALS, dump
from headoff.harness.reference.map_pictures import write_triptych
from headoff.harness.reference.maps import UPDATE, CaseMaps, incomparable, mismatches
from headoff.harness.settings import Settings
from headoff.harness.suite_files import suites_folder

FAILURES = Path("build", "golden-failures")
"""Where pictures of failures go, beside `golden/`."""


class GoldenFile(SingleFileSnapshotExtension):
    """One file per test case, `golden/<test file>/<test name>.<extension>`.

    `root` is another folder than `golden/`; see `kept_in`.
    """

    root: Path | None = None

    @classmethod
    def dirname(cls, *, test_location: PyTestLocation) -> str:
        # Ends in the test file's name: syrupy looks there, and only there, for golden files without a test.
        root = cls.root or golden_folder(Path(test_location.filepath))
        return str(root / test_location.basename)


class GoldenDetections(GoldenFile):
    """Expected detections: one JSON file per scene.

    Numbers match when they differ by one unit of the last decimal at most: two machines may round the same
    float64 to two sides.
    """

    _write_mode = WriteMode.TEXT
    file_extension = "json"

    def serialize(self, data: Any, **_: Any) -> str:
        return dump(data)

    def matches(self, *, serialized_data: Any, snapshot_data: Any) -> bool:
        return _same(json.loads(serialized_data), json.loads(snapshot_data))


class GoldenMaps(GoldenFile):
    """Expected relevance maps: one npz per image and configuration.

    What is compared is a `CaseMaps`, which says itself how far it may be off. A failure says which maps are wrong and
    by how much, and draws the worst of them.
    """

    _write_mode = WriteMode.BINARY
    file_extension = "npz"
    _location: Path | None = None

    def serialize(self, data: Any, **_: Any) -> bytes:
        return data.to_bytes()

    def read_snapshot_data_from_location(self, *, snapshot_location: str, **names: Any) -> Any:
        self._location = Path(snapshot_location)  # for what is said of a failure
        return super().read_snapshot_data_from_location(snapshot_location=snapshot_location, **names)

    def matches(self, *, serialized_data: Any, snapshot_data: Any) -> bool:
        return not mismatches(CaseMaps.from_bytes(snapshot_data), CaseMaps.from_bytes(serialized_data))

    def diff_lines(self, serialized_data: Any, snapshot_data: Any) -> Iterator[str]:
        if not snapshot_data:
            yield f"run `{UPDATE}`"
            return
        expected, found = CaseMaps.from_bytes(snapshot_data), CaseMaps.from_bytes(serialized_data)
        yield from mismatches(expected, found)
        if not incomparable(expected, found):
            assert self._location is not None
            folder = self._location.parents[2] / FAILURES
            yield f"expected | got | difference of the worst: {write_triptych(expected, found, folder)}"


class ExpectedMaps(GoldenMaps):
    """The golden file that another test of the same file writes, to be compared with and no more.

    `golden(name="<that test's name>") == maps`.
    """

    @classmethod
    def get_snapshot_name(cls, *, test_location: PyTestLocation, index: int | str = 0) -> str:
        return cls._sanitize_filename(str(index))


def read_only(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    """The same, deaf to `--snapshot-update`: what is not the truth must not become it."""
    return replace(snapshot, update_snapshots=False, update_new_snapshots_only=False)


def golden_folder(test_file: Path) -> Path:
    """`golden/` beside the folder of the test file."""
    return test_file.parent.parent / "golden"


def golden_root(settings: Settings) -> Path:
    """The folder of golden files: that of the settings, or `golden/` beside the suites."""
    return settings.golden_dir.absolute() if settings.golden_dir else suites_folder() / "golden"


def kept_in(root: Path, extension: type[GoldenFile]) -> type[GoldenFile]:
    """The same syrupy extension with its files under `root`."""
    return type(extension.__name__, (extension,), {"root": root})


def _same(one: Any, other: Any, key: str = "") -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_same(one[name], other[name], name) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_same(a, b, key) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        unit = 10.0 ** -(BOX_DECIMALS if key == "box" else SCORE_DECIMALS)
        return abs(one - other) <= 1.001 * unit
    return type(one) is type(other) and one == other
