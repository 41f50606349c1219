"""The JSON document of a verification: what its parts are, and what is wrong with something that is not one."""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    NotRequired,
    TypedDict,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from headoff.errors import SettingError

FORMAT = "headoff verification 1"

Verdict = Literal["right", "wrong", "slower", "incomplete"]
Outcome = Literal["passed", "failed", "skipped", "error"]
RatioVerdict = Literal["faster", "slower", "inconclusive", "no slower"]

VERDICTS: dict[Verdict, str] = {
    "right": "Right",
    "wrong": "Wrong",
    "slower": "Right, but slower than allowed",
    "incomplete": "No verdict",
}
"""Verdicts in words."""

PNG = b"\x89PNG\r\n\x1a\n"


class FindingRecord(TypedDict):
    """`headoff.harness.finding.Finding.as_dict()`."""

    property: str
    message: str
    case: str
    error: float | None
    budget: float | None
    site: str | None
    layer: int | None
    head: int | None
    configuration: str | None
    pictures: list[str]


class SuiteRecord(TypedDict):
    """Counts of a suite's tests by outcome, and their time."""

    name: str
    passed: int
    failed: int
    skipped: int
    errors: int
    seconds: float


class TestRecord(TypedDict):
    """One test.

    - `message`: why it was skipped or failed; empty where it passed
    - `problem`: why it failed, where that is no word about the attention; else empty
    """

    id: str
    suite: str
    outcome: Outcome
    seconds: float
    message: str
    problem: NotRequired[str]
    findings: list[FindingRecord]


class BenchmarkRecord(TypedDict):
    """One comparison of patch and baseline, measured side by side.

    - `ratio`, `low`, `high`: time of the patch over that of the baseline, and its confidence interval
    - `max_slowdown`: the ratio that is allowed
    - `patch_seconds`, `baseline_seconds`: of one call
    - `patch_memory`, `baseline_memory`: peak bytes, where they are known
    - `outputs`: whether what was timed was right, when it was looked at again
    """

    name: str
    group: str
    heads_off: int | None
    ratio: float
    low: float
    high: float
    verdict: RatioVerdict
    max_slowdown: float
    patch_seconds: float
    baseline_seconds: float
    patch_memory: int | None
    baseline_memory: int | None
    rounds: int
    outputs: NotRequired[Literal["right", "wrong"]]


class Document(TypedDict):
    """All that is known of one run.

    - `headline`: the verdict as one readable line
    - `about`: what was run on what, in the order in which it is shown
    - `calls`: of the attention under test, by site
    - `cannot_tell`: wrong answers that the tolerances accept in this dtype or for this model
    - `notes`: what limits the verdict, as dtypes that were not tested
    - `diagnosis`: what is wrong, the root cause first
    - `pictures`: PNG files in base64, by the path that findings call them by
    """

    format: str
    verdict: Verdict
    headline: str
    about: dict[str, str | float | bool | None]
    machine: dict[str, Any]
    calls: dict[str, int]
    cannot_tell: list[str]
    notes: list[str]
    diagnosis: list[FindingRecord]
    suites: list[SuiteRecord]
    tests: list[TestRecord]
    benchmarks: list[BenchmarkRecord]
    pictures: dict[str, str]


def validate(document: object) -> Document:
    """`document`, checked. Entries that this version does not know are ignored.

    Raises:
        SettingError: names the first entry that is missing or of another type.
    """
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        what = f"its format is {found!r}" if found is not None else "it has no entry 'format'"
        raise SettingError(
            f"this is not the JSON of a verification ({what}, not {FORMAT!r}): "
            "give the file that `headoff verify --report FILE.json` wrote, and use the version of headoff that wrote it"
        )
    _check(document, Document, "")
    checked = cast(Document, document)
    for path, encoded in checked["pictures"].items():
        _check_picture(path, encoded)
    return checked


def _check_picture(path: str, encoded: str) -> None:
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    # The signature, and the header with width and height, which a page wants to know.
    if not data.startswith(PNG) or data[12:16] != b"IHDR" or len(data) < 24:
        raise _wrong(f"pictures[{path!r}]", "not a PNG file in base64")


def _check(value: Any, kind: Any, where: str) -> None:
    """Raise SettingError unless `value` is of the type `kind` throughout."""
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if is_typeddict(kind):
        _check_kind(value, dict, where, "an object")
        for name, entry in get_type_hints(kind, include_extras=True).items():
            place = f"{where}.{name}" if where else name
            optional = get_origin(entry) is NotRequired
            if name in value:
                _check(value[name], get_args(entry)[0] if optional else entry, place)
            elif not optional:
                raise _wrong(place, "missing")
    elif origin is dict:
        _check_kind(value, dict, where, "an object")
        for name, entry in value.items():
            _check(entry, inside[1], f"{where}[{name!r}]")
    elif origin is list:
        _check_kind(value, list, where, "a list")
        for index, entry in enumerate(value):
            _check(entry, inside[0], f"{where}[{index}]")
    elif origin is Literal:
        if value not in inside:
            raise _wrong(where, f"{_short(value)}, not one of {', '.join(inside)}")
    elif not isinstance(value, _classes(kind)) or (isinstance(value, bool) and bool not in _plain(kind)):
        raise _wrong(where, f"{_short(value)}, not {' or '.join(_NAMES[plain] for plain in _plain(kind))}")


def _check_kind(value: Any, kind: type, where: str, name: str) -> None:
    if not isinstance(value, kind):
        raise _wrong(where, f"{_short(value)}, not {name}")


_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}


def _plain(kind: Any) -> Sequence[type]:
    """The alternatives of a union, or the one type that there is."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _classes(kind: Any) -> tuple[type, ...]:
    """What counts as `kind`: a whole number is a number."""
    kinds = tuple(_plain(kind))
    return (*kinds, int) if float in kinds else kinds


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _wrong(where: str, what: str) -> SettingError:
    return SettingError(
        f"the JSON of the verification is damaged ({where} is {what}): run the verification again, or use the version "
        "of headoff that wrote it"
    )


_UNPRINTABLE = re.compile(r"\x1b\[[0-9;]*m|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` without a terminal's colours, control characters and lone surrogates, which a file must not have."""
    return _UNPRINTABLE.sub("", text)


def tally(benchmarks: Iterable[BenchmarkRecord]) -> dict[RatioVerdict, int]:
    """How many benchmarks have each verdict, the slower ones first; verdicts of none are left out."""
    counts = Counter(record["verdict"] for record in benchmarks)
    order: tuple[RatioVerdict, ...] = ("slower", "inconclusive", "no slower", "faster")
    return {verdict: counts[verdict] for verdict in order if counts[verdict]}
