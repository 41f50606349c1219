"""What the suites run on: one table of options, from which the command line, pytest and its ini file are made.

A field of `Settings` that is made by `_option` is an option of `headoff verify`, of pytest (`--headoff-NAME` and mostly
`--NAME`) and of pytest's configuration file (`headoff_NAME`). Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headoff.choices import DTYPES
from headoff.errors import SettingError, did_you_mean
from headoff.harness.checks.names import CHECKS, CLAIMED
from headoff.harness.contracts import Contract, contract_named

if TYPE_CHECKING:
    import torch

    from headoff.detr.checkpoints import ModelChoice

ALL = "all"
"""The dtype, or the check, that stands for all of them."""

FALLBACKS = ("masked", "sizes", "exception", "cpu")
"""Kinds of fallbacks that `headoff.harness.fallback` tells apart: with a mask alone, at some sites' sizes, after an
exception that was caught, and any of them on a CPU."""


@dataclass(frozen=True)
class Option:
    """How a setting is given as text.

    Attributes:
        name: `--NAME`, in words with dashes.
        field: of `Settings`.
        metavar: what stands for its text in the help.
        help: a sentence, with the default.
        read: from its text to its value; raises ValueError whose message continues "give ...".
        several: whether it can be repeated.
        short: whether pytest has it as `--NAME` too, not as `--headoff-NAME` alone.
        switch: whether `headoff verify` has it as `--NAME` and `--no-NAME`; as text it is yes or no.
        flag: whether it is given without a text, as `--NAME`; in pytest's configuration file it is yes or no.
        listed: whether a text may have several values with commas between them.
        group: of the help of `headoff verify`: input, speed or output.
    """

    name: str
    field: str
    metavar: str
    help: str
    read: Callable[[str], Any] = str
    several: bool = False
    short: bool = True
    switch: bool = False
    flag: bool = False
    listed: bool = False
    group: str = "input"

    @property
    def key(self) -> str:
        """Its name in pytest's configuration file, and where pytest keeps its text."""
        return "headoff_" + self.name.replace("-", "_")

    def value(self, text: str) -> Any:
        """Raises SettingError, one sentence, for a text that cannot be read."""
        try:
            return self.read(text)
        except SettingError:
            raise
        except ValueError as error:
            raise SettingError(f"--{self.name} cannot be {text!r}: give {error}") from None


def _option(default: Any, metavar: str, help: str, read: Callable[[str], Any] = str, **more: Any) -> Any:
    return field(
        default=default, metadata={"option": {"metavar": metavar, "help": help, "read": read, **more}}
    )


def _number(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = float("nan")
        if not least <= number < float("inf"):
            raise ValueError(f"a{' whole' if kind is int else ''} number from {least:g}")
        return number

    return read


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("yes or no")
    return text == "yes"


def _contract(text: str) -> str:
    return contract_named(text).name


def _check(text: str) -> str:
    if text not in (*CHECKS, ALL):
        names = f"{', '.join(CHECKS)} or {ALL}"
        raise SettingError(f"there is no check {text!r}{did_you_mean(text, CHECKS)}: name {names}")
    return text


def _fallback(text: str) -> str:
    if text not in FALLBACKS:
        raise SettingError(
            f"there is no kind of fallback {text!r}{did_you_mean(text, FALLBACKS)}: name {' or '.join(FALLBACKS)}"
        )
    return text


def _device(text: str) -> str:
    from headoff.devices import chosen_device

    return str(chosen_device(text))


def _dtype(text: str) -> str:
    if text not in (*DTYPES, ALL):
        names = f"{', '.join(DTYPES)} or {ALL}"
        raise SettingError(f"dtype {text!r} is not known{did_you_mean(text, DTYPES)}: use one of {names}")
    return text


@dataclass(frozen=True)
class Settings:
    """What was chosen, for one dtype.

    `dtypes` are all that were asked for: the verdict is about these.
    """

    attention: str = _option(
        "sdpa", "PATCH", "the attention under test: path/to/file.py:name, package.module:name, sdpa or eager"
    )
    contract: str = _option(
        "dense",
        "CONTRACT",
        "what it is called like: dense (default; query, key, value), or deformable (value, spatial_shapes, "
        "sampling_locations, attention_weights)",
        _contract,
    )
    model: str = _option(
        "scenes", "MODEL", "the detector, as of `headoff sweep --model` (default: the bundled one)"
    )
    heads_per_layer: int | None = _option(
        None,
        "N",
        "heads of every attention, where the model's file does not say it (default: what it says, else 8)",
        _number(int, 1),
        short=False,
    )
    dc5: bool | None = _option(
        None,
        "yes|no",
        "whether the backbone's last stage is dilated (default: what the model's file or its name says)",
        _yes_or_no,
        short=False,
        switch=True,
    )
    classes: Path | None = _option(
        None,
        "FILE",
        "names of the model's classes, one a line (default: those in its file, or COCO's)",
        Path,
        short=False,
    )
    short_side: int | None = _option(
        None,
        "PIXELS",
        "resize images to this short side (default: as the model was published)",
        _number(int, 1),
        short=False,
    )
    images: tuple[Path, ...] = _option(
        (),
        "FILE",
        "an image instead of the bundled scenes; can be repeated. Its expected results are computed in float64 the "
        "first time, which takes a while, and cached",
        Path,
        name="image",
        several=True,
    )
    device: str = _option(
        "cpu", "DEVICE", "cpu, cuda or cuda:1 (default: CUDA if available, else the CPU)", _device
    )
    dtype: str = _option(
        "float32",
        "DTYPE",
        "dtype of attention that the verdict is about: float32 (default), float64, bfloat16, float16 or all; can be "
        "repeated",
        _dtype,
        several=True,
    )
    forward_only: bool = _option(
        False,
        "yes|no",
        "test its forward pass alone, for kernels without a backward pass; relevance maps have the formula's gradients",
        _yes_or_no,
        flag=True,
    )
    check: tuple[str, ...] = _option(
        (),
        "NAME[,NAME]",
        f"try this as well (suite checks); can be repeated: {', '.join(CHECKS)} or {ALL} "
        f"(all but {' and '.join(CLAIMED)})",
        _check,
        several=True,
        listed=True,
    )
    allow_fallback: tuple[str, ...] = _option(
        (),
        "KIND[,KIND]",
        f"a fallback that is intended, which is a note then; can be repeated: {', '.join(FALLBACKS)}",
        _fallback,
        several=True,
        listed=True,
    )
    golden_dir: Path | None = _option(None, "FOLDER", "a folder with golden files of your own", Path)
    seed: int = _option(0, "N", "seed of the random inputs (default 0)", _number(int, 0), short=False)
    timeout: float = _option(
        600.0,
        "SECONDS",
        "how long its import, its first calls and each check may take (default 600; pytest limits the first two alone)",
        _number(float, 0.01),
        short=False,
    )
    baseline: str = _option(
        "sdpa",
        "PATCH",
        "the attention that its time is compared with (default sdpa, or grid_sample where it is deformable)",
        group="speed",
    )
    max_slowdown: float = _option(
        1.10,
        "RATIO",
        "it is too slow where its time is above this many times the baseline's with confidence (default 1.10)",
        _number(float, 0.01),
        group="speed",
    )
    bench_size: str = _option(
        "auto",
        "SIZE",
        "sizes of the benchmarks: auto (default), model, r50 or dc5",
        short=False,
        group="speed",
    )
    bench_seconds: float | None = _option(
        None,
        "SECONDS",
        "about how long each benchmark measures (default: 0.1 on a CPU, 1 on a GPU)",
        _number(float, 0),
        short=False,
        group="speed",
    )
    report: Path | None = _option(
        None,
        "FILE",
        "write a report: .html and the .json that it is made from, or .json alone",
        Path,
        group="output",
    )
    failures: Path = _option(
        Path("headoff-failures"),
        "FOLDER",
        "folder for pictures of failures (default headoff-failures)",
        Path,
        short=False,
        group="output",
    )
    dtypes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if _dtype(self.dtype) == ALL:
            raise SettingError(f"dtype {ALL!r} stands for several: use `read_settings`")
        if not self.dtypes:
            object.__setattr__(self, "dtypes", (self.dtype,))

    @property
    def model_choice(self) -> ModelChoice:
        """The model, with what its file may not say. Raises SettingError for a file of classes that cannot be read."""
        from headoff.detr.checkpoints import ModelChoice, class_names_in

        names = class_names_in(self.classes)
        return ModelChoice(self.model, self.heads_per_layer, self.dc5, names, self.short_side)

    @property
    def checks(self) -> tuple[str, ...]:
        """Names of the checks that were asked for, in the order of the list of them."""
        of_all = [name for name in CHECKS if name not in CLAIMED] if ALL in self.check else []
        return tuple(name for name in CHECKS if name in self.check or name in of_all)

    @property
    def of_contract(self) -> Contract:
        return contract_named(self.contract)

    @property
    def torch_dtype(self) -> torch.dtype:
        from headoff.devices import torch_dtype

        return torch_dtype(self.dtype)


OPTIONS = tuple(
    Option(**{"name": entry.name.replace("_", "-"), "field": entry.name, **entry.metadata["option"]})
    for entry in fields(Settings)
    if "option" in entry.metadata
)


def default_value(name: str, contract: str = "dense") -> Any:
    """The default of a setting, which may depend on the contract."""
    if name in ("attention", "baseline"):
        return contract_named(contract).default
    return getattr(Settings, name)


def read_settings(texts: Mapping[str, str | Iterable[str] | None]) -> list[Settings]:
    """Settings for each dtype that was asked for, at least one.

    Args:
        texts: by the names of options, their text, or texts where they can be repeated; None for the default.

    Raises:
        SettingError: a text cannot be read.
    """
    from headoff.devices import chosen_device

    values: dict[str, Any] = {}
    for option in OPTIONS:
        given = texts.get(option.name)
        if option.several and given:
            texts_of = [one for text in given for one in (text.split(",") if option.listed else [text])]
            values[option.field] = tuple(option.value(text) for text in texts_of)
        elif given:
            values[option.field] = option.value(str(given))
    values.setdefault("device", str(chosen_device(None)))
    for name in ("attention", "baseline"):
        values.setdefault(name, default_value(name, values.get("contract", Settings.contract)))
    asked = values.pop("dtype", (Settings.dtype,))
    dtypes = DTYPES if ALL in asked else tuple(dict.fromkeys(asked))
    first = Settings(**values, dtype=dtypes[0], dtypes=dtypes)
    return [replace(first, dtype=dtype) for dtype in dtypes]
