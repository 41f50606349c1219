"""The options of `headoff.harness.settings` as pytest's: on the command line, or in its configuration file.

Every option is `--headoff-<name>`, and `--<name>` as well where no other plugin or conftest file has that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest

from headoff.harness.settings import OPTIONS, Option, Settings, default_value, read_settings

if TYPE_CHECKING:
    from collections.abc import Sequence


def add_options(parser: pytest.Parser) -> None:
    """Declare all options under their long names, and as settings of a configuration file."""
    for option in OPTIONS:
        _add(parser, f"--headoff-{option.name}", option)
        kind: Literal["args", "string"] = "args" if option.several else "string"
        parser.addini(option.key, option.help, type=kind, default=None)


def add_short_names(parser: pytest.Parser) -> None:
    """Add the names without `headoff-` that nobody else has taken.

    Call it when all plugins and conftest files have declared theirs: names like `--device` are common, and a name that
    is declared twice would end every run of somebody else's tests.
    """
    for option in OPTIONS:
        if option.short and _is_free(parser, f"--{option.name}"):
            _add(parser, f"--{option.name}", option)


def _is_free(parser: pytest.Parser, name: str) -> bool:
    """Whether the parser does not know the option.

    pytest has no list of options that is public, and up to version 8 it notices duplicates only when it is too late. So
    the parser is asked to parse the option.
    """
    probe = f"{name}=probe"
    try:
        return probe in parser.parse_known_and_unknown_args([probe])[1]
    except (pytest.UsageError, SystemExit):
        return False  # it is known, and does not take such a value


def _add(parser: pytest.Parser, name: str, option: Option) -> None:
    group = parser.getgroup("headoff", "headoff: is this attention right, and what does it cost?")
    if option.flag:
        group.addoption(
            name, dest=option.key, default=None, action="store_const", const="yes", help=option.help
        )
        return
    group.addoption(
        name,
        dest=option.key,
        metavar=option.metavar,
        default=None,
        action="append" if option.several else "store",
        help=option.help,
    )


def text_of(config: pytest.Config, name: str) -> Any:
    """The text of an option: from the command line, else the configuration file; None where neither has it.

    A list of texts for an option that can be repeated.
    """
    key = next(option.key for option in OPTIONS if option.name == name)
    return config.getoption(key, None) or config.getini(key) or None


def value_of(config: pytest.Config, name: str) -> Any:
    """The value of an option that can be given once, or its default. Raises SettingError."""
    option = next(option for option in OPTIONS if option.name == name)
    text = text_of(config, name)
    if text is not None:
        return option.value(text)
    return default_value(option.field, "dense" if name == "contract" else value_of(config, "contract"))


def all_settings(config: pytest.Config) -> Sequence[Settings]:
    """The settings of a run, for each dtype asked for. Raises SettingError."""
    return read_settings({option.name: text_of(config, option.name) for option in OPTIONS})


def settings_from(config: pytest.Config) -> Settings:
    """The settings of a run in its first dtype. Raises SettingError."""
    return all_settings(config)[0]
