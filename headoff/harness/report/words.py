"""What a run found, in words: of a verdict, of numbers, of places in a model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

from headoff.harness.report.document import FindingRecord, Verdict

VERDICTS: dict[Verdict, str] = {
    "right": "Right",
    "wrong": "Wrong",
    "slower": "Right, but slower than allowed",
    "incomplete": "Incomplete: no verdict",
}

PROPERTIES = {
    "gate": "the head gate, which switches heads off",
    "mask": "the attention mask",
    "scale": "the factor 1/√D",
    "softmax": "the attention weights themselves",
    "sizes": "ragged sizes: the rest of a block, one query, one key, other numbers of heads or channels",
    "context": "the forward pass",
    "dq": "the gradient of the query",
    "dk": "the gradient of the key",
    "dv": "the gradient of the value",
    "softmax backward": "the gradients of query and key together",
    "precision": "errors much larger than the dtype's",
    "dtype": "the dtype of the context",
    "shape": "the shape of the context",
    "layout": "strides of inputs or of the context",
    "state": "something carried from call to call",
    "randomness": "other numbers for the same inputs",
    "in-place": "inputs that were modified",
    "crash": "an exception",
    "calls": "whether the patch was called at all",
    "detections": "logits, boxes and detections",
    "relevance": "relevance maps",
    "gradients": "end-to-end gradients through the model",
    "time": "what it costs beside the baseline",
}
"""What each property of a finding is about. Others, of later versions, are shown by their name alone."""


_UNPRINTABLE = re.compile(r"\x1b\[[0-9;]*m|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` without a terminal's colours, control characters and halves of characters, which no file may have."""
    return _UNPRINTABLE.sub("", text)


def counted(number: int, what: str) -> str:
    """`1 test`, `3,000 tests`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def seconds(value: float) -> str:
    """A time as people say it: `0.3 ms`, `12.5 s`, `3 min 5 s`."""
    if not math.isfinite(value):
        return "unknown"
    if value == 0:
        return "0 s"
    if value >= 60:
        minutes, rest = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{_three_digits(value / 1e-9)} ns"


def memory(value: int | None) -> str:
    """Bytes in binary units, or nothing where they are unknown."""
    if value is None:
        return ""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value} B"


def error(value: float) -> str:
    """An error or a budget, as short as the suites print them."""
    if math.isnan(value):
        return "NaN"
    return "infinite" if math.isinf(value) else f"{value:.1e}"


def ratio(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    return "infinite" if math.isinf(value) else f"{value:.3f}" if abs(value) < 99.5 else f"{value:,.0f}"


def measure(wrong: str) -> tuple[str, Callable[[float], str]]:
    """What the error of a finding about the property `wrong` is called, and how it is written."""
    return ("ratio", ratio) if wrong == "time" else ("error", error)


def excess(finding: FindingRecord) -> float | None:
    """How many times the budget the error is; None where one of them is not known."""
    wrong_by, allowed = finding["error"], finding["budget"]
    if wrong_by is None or allowed is None:
        return None
    if math.isnan(wrong_by) or allowed == 0:
        return math.inf
    return wrong_by / allowed


def times(value: float) -> str:
    """`12 times`, `7,600 times`."""
    if math.isinf(value):
        return "infinitely many times"
    if value >= 1e6:
        return f"{value:.0e} times"
    if value >= 100:
        return f"{round(value, 1 - int(math.log10(value))):,.0f} times"
    return f"{_three_digits(value)} times"


def places(findings: Iterable[FindingRecord]) -> str:
    """Where all of `findings` are: `decoder_cross, layers 0–5, heads 2 and 7, first 1 off`."""
    findings = list(findings)
    sites = sorted({each["site"] for each in findings if each["site"] is not None})
    layers = {each["layer"] for each in findings if each["layer"] is not None}
    heads = {each["head"] for each in findings if each["head"] is not None}
    configurations = sorted(
        {each["configuration"] for each in findings if each["configuration"]}, key=_natural
    )
    parts = [", ".join(sites)] if sites else []
    parts += [_numbered("layer", layers)] if layers else []
    parts += [_numbered("head", heads)] if heads else []
    if configurations:
        shown, more = configurations[:3], len(configurations) - 3
        parts.append("; ".join(shown) + (f" and {more} more" if more > 0 else ""))
    return ", ".join(parts)


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def first_line(message: str) -> str:
    """What a message comes to: of a traceback its last line, of anything else the first that is not empty."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return ""
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts `first 2 off` before `first 10 off`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _numbered(what: str, numbers: Iterable[int]) -> str:
    """`layer 3`, `layers 0–2 and 5`."""
    ordered = sorted(numbers)
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    said = listed([f"{low}" if low == high else f"{low}–{high}" for low, high in runs])
    return f"{what} {said}" if len(ordered) == 1 else f"{what}s {said}"


def _three_digits(value: float) -> str:
    return (
        f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"
    )
