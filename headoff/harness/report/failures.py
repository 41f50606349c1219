"""Failed tests by what is wrong, in words: one cause often fails hundreds of tests, and is one entry of a report."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from headoff.harness.report.document import Document, FindingRecord, TestRecord
from headoff.wording import format_error, format_ratio, number_ranges

PROPERTIES = {
    "gate": "the head gate, which switches heads off",
    "mask": "the attention mask",
    "scale": "the factor 1/√D",
    "sampling": "where values are sampled: positions and borders",
    "levels": "the levels: where they begin, their sizes",
    "weights": "the attention weights of the sampling points",
    "softmax": "the attention weights",
    "sizes": "ragged sizes: the rest of a block, one query, one key, other numbers of heads or channels",
    "context": "the forward pass",
    "dq": "the gradient of the query",
    "dk": "the gradient of the key",
    "dv": "the gradient of the value",
    "dlocations": "the gradient of the sampling locations",
    "dweights": "the gradient of the attention weights",
    "softmax backward": "the gradients of query and key together",
    "precision": "errors much larger than rounding in the dtype",
    "dtype": "the dtype of the context",
    "shape": "the shape of the context",
    "layout": "strides of inputs or of the context",
    "state": "something kept from call to call",
    "randomness": "other numbers for the same inputs",
    "in-place": "inputs that were modified",
    "crash": "an exception",
    "calls": "whether the patch was called at all",
    "compile": "what torch.compile makes of it",
    "opcheck": "its registration as a custom operator",
    "export": "what torch.export makes of it",
    "autocast": "calls under torch.autocast",
    "threads": "calls from several threads at once",
    "streams": "calls on several CUDA streams at once",
    "graph": "replays of a CUDA graph",
    "sanitizer": "memory accesses out of bounds",
    "vmap": "calls under torch.func.vmap",
    "detections": "logits, boxes and detections",
    "relevance": "relevance maps",
    "gradients": "end-to-end gradients through the model",
    "timing": "what was timed",
    "time": "time compared with the baseline",
}
"""What each property of a finding is about. Properties of later versions are shown by their name alone."""


@dataclass(frozen=True)
class Group:
    """Tests with one cause: the same property at the same site, or messages that differ in numbers only.

    Attributes:
        title: for people.
        wrong: the property that the findings are about; None where tests failed without findings.
        broken: the tests could not be run: an error in setup or teardown.
        tests: the most telling one first.
    """

    title: str
    wrong: str | None
    broken: bool
    tests: tuple[TestRecord, ...]

    @property
    def findings(self) -> list[FindingRecord]:
        """The first finding of each test that has one: what the group is about."""
        return [test["findings"][0] for test in self.tests if test["findings"]]

    @property
    def worst(self) -> FindingRecord | None:
        """The finding furthest beyond what is allowed; None where nothing was measured."""
        measured = [finding for finding in self.findings if excess(finding) is not None]
        return max(measured, key=lambda finding: excess(finding) or 0.0, default=None)


def grouped(document: Document) -> list[Group]:
    """All that failed: causes in the order of the diagnosis, then by how many tests they fail, errors last."""
    kinds: dict[tuple[bool, str, str], list[TestRecord]] = {}
    for test in document["tests"]:
        if test["outcome"] in ("failed", "error"):
            kinds.setdefault(_kind(test), []).append(test)
    causes = [(cause["property"], cause["site"] or "") for cause in document["diagnosis"]]

    def place(kind: tuple[bool, str, str]) -> tuple[bool, int, int]:
        cause = kind[1:]
        return kind[0], causes.index(cause) if cause in causes else len(causes), -len(kinds[kind])

    return [_group(kind, kinds[kind]) for kind in sorted(kinds, key=place)]


def skipped(tests: Iterable[TestRecord]) -> list[tuple[str, int]]:
    """Reasons for which tests were skipped, and how many; the most frequent first."""
    reasons = Counter(
        first_line(test["message"]).removeprefix("Skipped: ") or "no reason given"
        for test in tests
        if test["outcome"] == "skipped"
    )
    return reasons.most_common()


def measure(property: str) -> tuple[str, Callable[[float], str]]:
    """What the error of a finding is called, and how it is written."""
    return ("ratio", format_ratio) if property == "time" else ("error", format_error)


def excess(finding: FindingRecord) -> float | None:
    """How many times what is allowed the error is; None where one of them is not known."""
    error, allowed = finding["error"], finding["budget"]
    if error is None or allowed is None:
        return None
    return math.inf if math.isnan(error) or allowed == 0 else error / allowed


def places(findings: Sequence[FindingRecord]) -> str:
    """Where all of `findings` are: `decoder_cross, layers 0-5, heads 2, 7, first 1 off`."""
    sites = sorted({finding["site"] for finding in findings if finding["site"] is not None})
    layers = {finding["layer"] for finding in findings if finding["layer"] is not None}
    heads = {finding["head"] for finding in findings if finding["head"] is not None}
    names = sorted(
        {finding["configuration"] for finding in findings if finding["configuration"]}, key=_natural
    )
    parts = list(sites)
    for noun, numbers in (("layer", layers), ("head", heads)):
        if numbers:
            parts.append(f"{noun}{'s' if len(numbers) > 1 else ''} {number_ranges(sorted(numbers))}")
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append("; ".join(names[:3]) + more)
    return ", ".join(parts)


def first_line(message: str) -> str:
    """The last line of a traceback; of any other message, the first line that is not empty."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return ""
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def _kind(test: TestRecord) -> tuple[bool, str, str]:
    """(error, property or nothing, site or message): tests with the same are one group."""
    broken = test["outcome"] == "error"
    if test["findings"]:
        cause = test["findings"][0]
        return broken, cause["property"], cause["site"] or ""
    # Addresses and numbers belong to the case, not to the cause.
    return broken, "", re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?(e[-+]?\d+)?", "#", first_line(test["message"]))


def _group(kind: tuple[bool, str, str], tests: Sequence[TestRecord]) -> Group:
    broken, property, where = kind
    if property:
        title = f"{property} at {where}" if where else property
    else:
        title = first_line(tests[0]["message"]) or "no message"
    return Group(title, property or None, broken, tuple(sorted(tests, key=_telling)))


def _telling(test: TestRecord) -> tuple[bool, float, float]:
    """Sorts a test with a picture before others, then by layer and head: the earliest one is no consequence."""
    if not test["findings"]:
        return True, 0.0, 0.0
    cause = test["findings"][0]
    pictured = any(finding["pictures"] for finding in test["findings"])
    layer, head = (math.inf if at is None else float(at) for at in (cause["layer"], cause["head"]))
    return not pictured, layer, head


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts `first 2 off` before `first 10 off`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
