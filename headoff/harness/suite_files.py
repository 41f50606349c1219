"""Where the heads_off suites are: next to the package in a checkout, inside it where it is installed."""

from __future__ import annotations

from pathlib import Path

import headoff
from headoff.errors import SettingError

PATTERN = "test_heads_off_*.py"


def suites_folder() -> Path:
    """The folder that holds `tests/` and `golden/`. Raises SettingError where they are not there."""
    package = Path(headoff.__file__).parent
    for folder in (package / "suites", package.parent):
        if any(folder.glob(f"tests/{PATTERN}")):
            return folder
    raise SettingError(f"the heads_off suites are missing from {package}: install headoff again")


def suite_names() -> list[str]:
    """`operator`, `detections`, ...: what `suite_file` takes."""
    files = sorted(suites_folder().glob(f"tests/{PATTERN}"))
    return [file.stem.removeprefix("test_heads_off_") for file in files]


def suite_file(name: str) -> Path:
    """The test file of a suite. Raises SettingError, naming those there are, for one that is not."""
    if name not in suite_names():
        raise SettingError(f"there is no suite {name!r}: name one of {', '.join(suite_names())}")
    return suites_folder() / "tests" / f"test_heads_off_{name}.py"
