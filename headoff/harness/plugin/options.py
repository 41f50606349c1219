"""Options of the pytest plugin: on the command line, or in pytest's configuration file as `headoff_<name>`.

Every option is `--headoff-<name>`, and `--<name>` as well where no other plugin or conftest file has that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from headoff.harness.settings import Settings


@dataclass(frozen=True)
class Option:
    """One option: its name, what it means, and how its text is read."""

    name: str
    help: str
    default: str | None = None
    metavar: str | None = None
    several: bool = False

    @property
    def key(self) -> str:
        """Its name in configuration files, and where pytest keeps it."""
        return "headoff_" + self.name.replace("-", "_")


OPTIONS = (
    Option(
        "attention",
        "the attention under test: path/to/file.py:name, package.module:name, sdpa or eager",
        "sdpa",
        "PATCH",
    ),
    Option(
        "model",
        "the detector, as `headoff sweep --model` takes it; the bundled one by default",
        "scenes",
        "MODEL",
    ),
    Option("image", "an image instead of the bundled scenes; can be repeated", None, "FILE", several=True),
    Option("device", "cpu, cuda, cuda:1; CUDA where there is one by default", None, "DEVICE"),
    Option("dtype", "float32 (default), float64, bfloat16 or float16", "float32", "DTYPE"),
    Option("golden-dir", "a folder with golden files of your own", None, "FOLDER"),
    Option(
        "report",
        "write a report: .html, with the .json it is made of beside it, or .json alone",
        None,
        "FILE",
    ),
    Option("baseline", "what the benchmarks compare the attention with", "sdpa", "PATCH"),
    Option("max-slowdown", "a benchmark fails where its ratio is surely above this", "1.10", "RATIO"),
    Option("bench-size", "sizes of the benchmarks: auto (default), model, r50 or dc5", "auto", "SIZE"),
    Option("bench-seconds", "about how long each benchmark measures", None, "SECONDS"),
    Option("failures", "folder for pictures of failures", "headoff-failures", "FOLDER"),
    Option("seed", "of the random inputs", "0", "N"),
)
LONG_ONLY = ("bench-size", "bench-seconds", "failures", "seed")
SHORT = tuple(option for option in OPTIONS if option.name not in LONG_ONLY)
"""Those that have a name without `headoff-` as well."""


def add_options(parser: pytest.Parser) -> None:
    """Declare all of `OPTIONS` under their long names, and as settings of a configuration file."""
    for option in OPTIONS:
        _add(parser, f"--headoff-{option.name}", option)
        kind: Literal["args", "string"] = "args" if option.several else "string"
        parser.addini(option.key, option.help, type=kind, default=None)


def add_short_names(parser: pytest.Parser) -> None:
    """Add the names without `headoff-` that nobody else has taken.

    To be called when all plugins and conftest files have declared theirs: names like `--device` are common, and taking
    one that is wanted by somebody else would end every run of their tests.
    """
    groups = [*getattr(parser, "_groups", ()), getattr(parser, "_anonymous", None)]
    taken = {
        name for group in groups if group is not None for option in group.options for name in option.names()
    }
    for option in SHORT:
        if f"--{option.name}" not in taken:
            _add(parser, f"--{option.name}", option)


def _add(parser: pytest.Parser, name: str, option: Option) -> None:
    group = parser.getgroup("headoff", "headoff: is this attention right, and what does it cost?")
    group.addoption(
        name,
        dest=option.key,
        metavar=option.metavar,
        default=None,
        action="append" if option.several else "store",
        help=option.help,
    )


def _named(name: str) -> Option:
    return next(each for each in OPTIONS if each.name == name)


def value_of(config: pytest.Config, name: str) -> Any:
    """What was chosen for an option: on the command line, else in the configuration file, else its default."""
    option = _named(name)
    given = config.getoption(option.key, None)
    if given in (None, []):
        given = config.getini(option.key)
    return given if given not in (None, "", []) else option.default


def was_chosen(config: pytest.Config, name: str) -> bool:
    """Whether the option was given at all, wherever."""
    option = _named(name)
    return bool(config.getoption(option.key, None) or config.getini(option.key))


def settings_from(config: pytest.Config) -> Settings:
    """All that was chosen. Raises SettingError for what cannot be."""
    from headoff.devices import chosen_device
    from headoff.harness.settings import Settings

    folder = value_of(config, "golden-dir")
    return Settings(
        attention=value_of(config, "attention"),
        model=value_of(config, "model"),
        images=tuple(Path(image) for image in value_of(config, "image") or ()),
        device=str(chosen_device(value_of(config, "device"))),
        dtype=value_of(config, "dtype"),
        golden_dir=Path(folder) if folder else None,
        failures=Path(value_of(config, "failures")),
        seed=_number(config, "seed", int, 0),
        baseline=value_of(config, "baseline"),
        max_slowdown=_number(config, "max-slowdown", float, 0.0),
    )


def seconds_chosen(config: pytest.Config) -> float | None:
    """How long a benchmark is to measure; None for what suits the device. Raises SettingError."""
    return _number(config, "bench-seconds", float, 0.0) if was_chosen(config, "bench-seconds") else None


def _number(config: pytest.Config, name: str, kind: Callable[[str], Any], least: float) -> Any:
    from headoff.errors import SettingError

    text = value_of(config, name)
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not number >= least:
        raise SettingError(f"--{name} cannot be {text!r}: give a number from {least:g}")
    return number
