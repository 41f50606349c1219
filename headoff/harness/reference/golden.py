"""Golden files, under `golden/`: their formats, and the syrupy extensions that read and write them.

Read with syrupy's `golden == value` (never `value == golden`). Written by `--snapshot-update` only, and only by tests
that run the float64 oracle. They do not depend on the machine: float64 arithmetic differs between machines by some
1e-13, the detections have 6 decimals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode
from syrupy.location import PyTestLocation

from headoff.detections import Detections
from headoff.harness.reference.maps import UPDATE, CaseMaps, incomparable, mismatches
from headoff.harness.reference.pictures import draw_maps
from headoff.harness.settings import Settings
from headoff.harness.suite_files import suites_folder

FAILURES = Path("build", "golden-failures")
"""Where pictures of failures go, in the folder that holds `golden/`."""

SCORE_DECIMALS = 6
BOX_DECIMALS = 4


def detection_rows(detections: Detections) -> list[dict[str, Any]]:
    """Detections of one configuration as a golden file holds them."""
    return [
        {
            "query": detection.query,
            "class": detection.class_name,
            "score": round(detection.score, SCORE_DECIMALS),
            "box": [round(side, BOX_DECIMALS) for side in detection.box],
        }
        for detection in detections
    ]


class GoldenFile(SingleFileSnapshotExtension):
    """One file per test case, `golden/<test file>/<test name>.<extension>`.

    `root` is another folder than `golden/`; see `in_folder`.
    """

    root: Path | None = None

    @classmethod
    def dirname(cls, *, test_location: PyTestLocation) -> str:
        # Ends in the test file's name: syrupy looks there, and only there, for golden files without a test.
        root = cls.root or golden_folder(Path(test_location.filepath))
        return str(root / test_location.basename)


class GoldenDetections(GoldenFile):
    """Expected detections: one JSON file per scene, with the `confidence`, the `image_size`, and `configurations`.

    Numbers match when they differ by at most one unit of the last decimal, since two machines may round the same
    float64 up and down.
    """

    _write_mode = WriteMode.TEXT
    file_extension = "json"

    def serialize(self, data: Any, **_: Any) -> str:
        return _json_text(data)

    def matches(self, *, serialized_data: Any, snapshot_data: Any) -> bool:
        return _same(json.loads(serialized_data), json.loads(snapshot_data))


class GoldenScores(GoldenDetections):
    """Expected scores of heads: one JSON file per scene, compared as detections are."""

    def serialize(self, data: Any, **_: Any) -> str:
        text = json.dumps(data, indent=1)
        # The scores of a layer in one line, so that a difference reads well in a review.
        return re.sub(r"\[([^][]*)\]", lambda row: f"[{' '.join(row[1].split())}]", text) + "\n"


class GoldenMaps(GoldenFile):
    """Expected relevance maps: one npz per image and configuration.

    Compared with a `CaseMaps` within its tolerance. A failure says which maps are wrong and by how much, and draws the
    worst of them.
    """

    _write_mode = WriteMode.BINARY
    file_extension = "npz"
    _location: Path | None = None

    def serialize(self, data: Any, **_: Any) -> bytes:
        return data.to_bytes()

    def read_snapshot_data_from_location(self, *, snapshot_location: str, **names: Any) -> Any:
        self._location = Path(snapshot_location)  # for the message of a failure
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
            yield f"expected | found | difference of the worst: {draw_maps(expected, found, folder)}"


def golden_folder(test_file: Path) -> Path:
    """`golden/` in the folder that holds the test file's folder."""
    return test_file.parent.parent / "golden"


def golden_root(settings: Settings) -> Path:
    """The folder of golden files: that of the settings, or the `golden/` of the suites."""
    return settings.golden_dir.absolute() if settings.golden_dir else suites_folder() / "golden"


def in_folder(root: Path, extension: type[GoldenFile]) -> type[GoldenFile]:
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


def _json_text(expected: Mapping[str, Any]) -> str:
    """JSON with one detection per line, so that a difference reads well in a review."""
    lines = [
        "{",
        f' "confidence": {json.dumps(expected["confidence"])},',
        f' "image_size": {json.dumps(expected["image_size"])},',
        ' "configurations": {',
    ]
    names = list(expected["configurations"])
    for name in names:
        rows = [f"   {json.dumps(row)}" for row in expected["configurations"][name]]
        body = "[\n" + ",\n".join(rows) + "\n  ]" if rows else "[]"
        lines.append(f"  {json.dumps(name)}: {body}" + ("," if name != names[-1] else ""))
    return "\n".join([*lines, " }", "}"]) + "\n"
