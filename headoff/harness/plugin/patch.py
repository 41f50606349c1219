"""The attention under test, and what a run learns from it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from headoff.attention import AdaptedAttention
from headoff.choices import DTYPES
from headoff.deformable import AdaptedDeformableAttention
from headoff.errors import AttentionError
from headoff.harness.finding import Finding
from headoff.harness.forward_only import ForwardOnlyAttention
from headoff.harness.settings import Settings

Result = TypeVar("Result")


class CountedAttention(AdaptedAttention):
    """An attention that adds each of its calls to the count of its patch, and remembers what it raised.

    An AdaptedAttention, so that all code that looks for the user's own callable (its label, its file) finds it.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # the user's callable may not be hashable

    def __init__(self, attention: Any, label: str, patch: Patch) -> None:
        adapted = isinstance(attention, (AdaptedAttention, AdaptedDeformableAttention))
        call = attention.call if adapted else attention
        super().__init__(call, label, None, takes_gate=True)
        object.__setattr__(self, "attention", attention)  # the class is frozen
        object.__setattr__(self, "patch", patch)

    attention: Any
    patch: Patch

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        self.patch.calls_made += 1
        try:
            return self.attention(*arguments, **keywords)
        except SystemExit as error:  # pytest would end without a word
            self.patch.raised = AttentionError(f"it called sys.exit({error.code!r})")
            raise self.patch.raised from error
        except Exception as error:
            self.patch.raised = error
            raise


NOTHING_NOTED: dict[str, Any] = {
    "dtype": None,
    "calls_credited": 0,
    "calls": {},
    "unsupported": {},
    "observed": [],
    "cannot_tell": [],
    "remarks": [],
    "findings": [],
    "message": "",
}
"""What the plugin notes with each phase (setup, call, teardown) of a test, as types that JSON knows."""


class Patch:
    """What tests get as `under_test`: the attention, and what to test it on and with.

    Attributes:
        attention: the callable of the contract that was asked for; each call is counted. With `--forward-only` its
            gradients are the formula's.
        uncounted: the same without the counter, for timing: a wrapper costs time, and CUDA graphs are captured only
            for headoff's own callables. Say `called` where it is used. Always the user's own, which may have no
            backward pass.
        label: the attention as it was asked for.
        device: to test it on.
        dtype: to test it in.
        other_dtypes: names of those that nobody asked for: what is wrong there is a note, see `observed`.
        seed: of random inputs.
        settings: all that was chosen.
        calls: calls in the model by site, added by the suites.
        calls_made: all calls so far.
        raised: the exception that the attention raised last.
    """

    def __init__(self, attention: Any, settings: Settings) -> None:
        self.settings = settings
        self.label = settings.attention
        self.device = torch.device(settings.device)
        self.dtype = settings.torch_dtype
        self.other_dtypes = tuple(name for name in DTYPES if name not in settings.dtypes)
        self.seed = settings.seed
        self.uncounted = attention
        if settings.forward_only:
            attention = ForwardOnlyAttention(attention, self.label, settings.of_contract)
        self.attention: Any = CountedAttention(attention, self.label, self)
        self.calls: Counter[str] = Counter()
        self.calls_made = 0
        self.raised: Exception | None = None
        self._credited = 0
        self._reported = 0
        self._once: dict[tuple[Any, ...], tuple[Any, int]] = {}
        self._notes = copy.deepcopy(NOTHING_NOTED)

    @classmethod
    def of(cls, settings: Settings) -> Patch:
        """The patch that `settings` name. Raises AttentionError where there is no such attention."""
        return cls(settings.of_contract.resolve(settings.attention), settings)

    @property
    def calls_credited(self) -> int:
        """Calls that count for the tests so far: those made, and those of cached results."""
        return self.calls_made + self._credited

    def called(self, times: int = 1) -> None:
        """Credit the running test with calls of `uncounted`."""
        self._credited += times

    def once(self, function: Callable[..., Result], *args: Any) -> Result:
        """`function(*args)`, computed once per process; every test that asks for it is credited with its calls.

        Args:
            function: known by its identity, so not a lambda made in the test.
            args: hashable.

        Example:
            def test_expected_maps(under_test, reference_case, configuration):
                findings = under_test.once(findings_of, under_test, reference_case)
                fail_on([f for f in findings if f.configuration == configuration])
        """
        key = (function, *args)
        if key in self._once:
            result, calls = self._once[key]
            self._credited += calls
            return result
        before = self.calls_credited
        result = function(*args)
        self._once[key] = result, self.calls_credited - before
        return result

    def in_model(self, findings_of: Callable[..., list[Finding]], case: Any, **more: Any) -> list[Finding]:
        """What is wrong with a model that calls this attention, in the words of a suite's function; computed once.

        Args:
            findings_of: such as `relevance_findings`: called with the attention, the case, device, dtype, and `calls`.
            case: a reference case.
            more: further arguments, hashable.
        """
        return self.once(_findings_in_model, self, findings_of, case, frozenset(more.items()))

    def not_supported(self, what: str, why: str) -> None:
        """Note that the patch raises on `what`, a dtype or a kind of mask that the model never makes.

        Args:
            what: as the subject of a sentence: `float64`.
            why: what the patch said.
        """
        self._notes["unsupported"][what] = why

    def observed(self, findings: Iterable[Finding], where: str) -> None:
        """Note wrong results in something nobody asked for, such as another dtype; they fail nothing."""
        self._notes["observed"] += [[where, finding.as_dict()] for finding in findings]

    def cannot_tell(self, what: str) -> None:
        """Note a wrong answer that the tolerance accepts in this dtype or for this model.

        The verdict names these in its first lines.
        """
        self._notes["cannot_tell"].append(what)

    def remark(self, what: str) -> None:
        """Note what is worth knowing and no failure, a sentence."""
        self._notes["remarks"].append(what)

    def take_notes(self) -> dict[str, Any]:
        """What was noted since this was asked last; see `NOTHING_NOTED`."""
        notes, self._notes = self._notes, copy.deepcopy(NOTHING_NOTED)
        notes |= {
            "dtype": self.settings.dtype,
            "calls": dict(self.calls),
            "calls_credited": self.calls_credited - self._reported,
        }
        self._reported = self.calls_credited
        self.calls.clear()
        return notes


def _findings_in_model(
    patch: Patch, findings_of: Callable[..., list[Finding]], case: Any, more: Iterable[tuple[str, Any]]
) -> list[Finding]:
    return findings_of(patch.attention, case, patch.device, patch.dtype, calls=patch.calls, **dict(more))
