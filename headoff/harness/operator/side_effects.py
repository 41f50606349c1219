"""Side effects of an attention call: everything that must hold apart from the numbers of single calls.

A call leaves its inputs and torch's settings as they are, gives the same bits for the same inputs, carries nothing over
to later calls, and returns a context with memory of its own. Each check of `SIDE_EFFECTS` is about one such property.
Results of consecutive calls are compared with the truth of each, so it does not matter how a patch remembers things.

The checks are in `memory`, `determinism` and `call_order`, with the cases that each is tried on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headoff.attention.contract import Attention
from headoff.attention.eager import eager
from headoff.errors import SettingError
from headoff.harness.exceptions import describe_exception
from headoff.harness.finding import Finding, Property
from headoff.harness.operator.call import Results, Tensors, call, context_alone, tensors_of
from headoff.harness.operator.cases import Case, Fields, OperatorCase
from headoff.harness.operator.compare import (
    comparisons,
    describe,
    findings_of,
    operator_findings,
    unsupported_dtype,
    unsupported_input,
)
from headoff.harness.operator.conditions import sized
from headoff.harness.operator.reference import truth_for
from headoff.harness.torch_settings import watched_settings

WITH_AND_WITHOUT: tuple[Fields, ...] = (
    {},
    {"mask": "none", "gate": "none"},
    {"mask": "none", "gate": "fractions"},
    {"mask": "bias", "gate": "none"},
    {"mask": "bias per head", "gate": "per item"},
)
"""Mask and gate, which a patch may have separate code for: both, neither, one of them, both of other kinds."""


REPEATS = 8
"""Calls that must give the same before what is wrong with one is called state."""


SEQUENCE: tuple[Fields, ...] = (
    {},
    {"seed": 1},
    {"gate": "none"},
    {"gate": "binary"},
    {"mask": "none"},
    {"mask": "rows per item"},
    {"mask": "bias"},
    {"mask": "none", "gate": "none"},
    {"queries": 40, "keys": 70},
    {"queries": 5, "keys": 9},
    {"queries": 19, "keys": 36},
    {"layout": "heads last"},
    {"layout": "channels first"},
    {"batch": 4, "heads": 2},
    {"batch": 1, "heads": 8},
    {"channels": 64},
    {"channels": 16},
    {"gate": "all off"},
    {"mask": "fully masked item"},
    {"queries": 37, "keys": 19},
    {"seed": 2},
    # A size that no call had before; the last two masks have as many keys in each item.
    {"mask": "no padding", "keys": 54},
    {"mask": "padding", "keys": 54},
    {"mask": "padding flipped", "keys": 54},
    {"mask": "additive padding", "gate": "none"},
    {"mask": "additive left padding", "gate": "none"},
    {},
)
"""Calls that differ from the one before in contents, gate, mask, sizes or strides. `seed` is added to the trial's."""


def _by_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """Torch's own attention, without the gate."""
    return scaled_dot_product_attention(query, key, value, attn_mask)


@dataclass(frozen=True)
class Trial:
    """An attention, and where it is tried.

    Attributes:
        attention: the callable under test.
        dtype, device, seed: of the tensors.
        check: name of the side effect.
        own_size: keys of the usual case; another number for each check, so that its first call is the first of that
            size.
    """

    attention: Any
    dtype: torch.dtype
    device: torch.device
    seed: int
    check: str
    own_size: int

    sequence: ClassVar[tuple[Fields, ...]] = SEQUENCE
    oracle: ClassVar[Any] = staticmethod(eager)

    def case(self, **fields: Any) -> Case:
        """A case of moderate, ragged sizes with gate and mask, changed by `fields`."""
        usual: Fields = {
            "name": self.check,
            "batch": 2,
            "heads": 4,
            "queries": 19,
            "keys": self.own_size,
            "gate": "full",
            "mask": "padding",
            "seed": self.seed,
            "dtype": self.dtype,
        }
        return OperatorCase(**{**usual, **fields})

    def may_differ(self, name: str, tensors: Tensors) -> bool:
        """Whether the bits of a gradient may differ from call to call: where those of torch's own attention do."""
        if self.device.type == "cpu":
            return False
        first, *others = (call(_by_torch, tensors) for _ in range(4))
        return any(not same(first[of], other[of]) for other in others for of in first)

    def unsupported_dtype(self, dtype: torch.dtype) -> str | None:
        return unsupported_dtype(self.attention, dtype, self.device)

    def fresh(self, case: Case, **fields: Any) -> Case:
        """A case of a size that no call had: with one batch item more, and other `fields`."""
        return replace(case, batch=case.batch + 1, **fields)

    def one_item_more(self, tensors: Any, case: Case) -> Tensors:
        """`tensors` of the case with the first batch item a second time."""
        return sized(tensors, "batch items", case.batch + 1)

    def tensors(self, case: Case) -> Any:
        return tensors_of(case, self.device)

    def call(self, tensors: Tensors) -> Results:
        """Context and gradients."""
        return call(self.attention, tensors)

    def forward(self, tensors: Tensors) -> Tensor:
        """The context, without gradients."""
        return context_alone(self.attention, tensors)

    def context(self, inputs: Iterable[Tensor], tensors: Tensors) -> Tensor:
        """The context of these inputs (query, key and value), with the mask and gate of `tensors`."""
        return tensors.attend(self.attention, inputs)

    def wrong(self, case: Case, results: Results) -> list[Finding]:
        """What is wrong with `results`, which may be the context alone."""
        return findings_of(results, case, self.device)

    def wrong_calls(self, case: Case) -> list[Finding]:
        """What is wrong with a call without gradients, or else with one that has them.

        Nothing for a kind of mask that the attention does not support.
        """
        tensors = self.tensors(case)
        try:
            return self.wrong(case, {"context": self.forward(tensors)}) or self.wrong(
                case, self.call(tensors)
            )
        except Exception:
            if unsupported_input(self.attention, case, self.device):
                return []
            raise

    def state(self, case: Case, findings: list[Finding], when: str, **fields: int) -> list[Finding]:
        """`findings` about `case`, attributed to state that is carried from call to call.

        Unless the same is wrong where nothing can have been carried over, in a `fresh` case with other `fields`: then
        what is wrong there.
        """
        if plain := operator_findings(self.attention, self.fresh(case, **fields), self.device):
            return plain
        first, *others = (self.forward(self.tensors(case)) for _ in range(REPEATS))
        if not all(same(first, other) for other in others):
            return finding(
                "randomness", f"the context differs between {REPEATS} calls with the same inputs", case
            )
        return [replace(findings[0], property="state", message=f"{when}, {findings[0].message}")]

    def wrong_context(self, case: Case, tensors: Tensors, when: str) -> list[Finding]:
        """What is wrong with the context of other `tensors` than the case's, of the same sizes.

        It is state if it is right with one batch item more, the first again: in a call of another size, and with memory
        of its own.
        """
        if not (wrong := self._described(case, tensors)):
            return []
        more = self.one_item_more(tensors, case)
        is_state = not self._described(replace(case, batch=case.batch + 1), more)
        return finding("state" if is_state else "context", f"{when}, {wrong}", case)

    def _described(self, case: Case, tensors: Tensors) -> str | None:
        truth = truth_for(tensors, case)
        (comparison,) = comparisons({"context": self.forward(tensors)}, case, self.device, truth)
        return None if comparison.is_right else describe(comparison, case)


Check = Callable[[Any, Case], list[Finding]]


@dataclass(frozen=True)
class SideEffect:
    """A check, the cases that it is tried on one after the other, and whether it is made in every dtype."""

    check: Check
    cases: tuple[Fields, ...]
    in_all_dtypes: bool


SIDE_EFFECTS: dict[str, SideEffect] = {}
"""The checks by name."""


def side_effect(
    name: str, *cases: Fields, also: tuple[Fields, ...] = (), in_all_dtypes: bool = False
) -> Callable[[Check], Check]:
    """Register the decorated check under `name`, to be tried on `cases` and `also` (the usual case by default)."""

    def register(check: Check) -> Check:
        SIDE_EFFECTS[name] = SideEffect(check, (*cases, *also) or ({},), in_all_dtypes)
        return check

    return register


def finding(kind: Property, message: str, case: Case) -> list[Finding]:
    return [Finding(kind, message, str(case))]


def side_effect_findings(
    attention: Attention, name: str, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> list[Finding]:
    """What is wrong with `attention` by the check `name` of `SIDE_EFFECTS`; nothing where it is right.

    Raises:
        SettingError: there is no such check.
    """
    return findings_of_trial(Trial, SIDE_EFFECTS, attention, name, dtype, device, seed)


def findings_of_trial(
    kind: type[Trial],
    checks: Mapping[str, SideEffect],
    attention: Any,
    name: str,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> list[Finding]:
    """What is wrong with a callable by the check `name` of `checks`, tried by trials of this kind.

    Raises:
        SettingError: there is no such check.
    """
    if name not in checks:
        raise SettingError(f"there is no check {name!r}: use one of {', '.join(checks)}")
    trial = kind(attention, dtype, torch.device(device), seed, name, 37 + 2 * list(checks).index(name))
    with watched_settings() as changes:
        # An attention that is wrong from its first call is not blamed for a side effect.
        findings = operator_findings(attention, trial.case(), device)
        if findings and findings[0].property == "context":
            findings = (
                trial.wrong_context(trial.case(), trial.tensors(trial.case()), "after other calls")
                or findings
            )
        for fields in checks[name].cases:
            findings = findings or _findings(trial, checks[name].check, trial.case(**fields))
    return findings or [Finding("state", f"a call changes {change}", name) for change in changes]


def _findings(trial: Trial, check: Check, case: Case) -> list[Finding]:
    try:
        return check(trial, case)
    except Exception as error:
        if unsupported_input(trial.attention, case, trial.device):
            return []
        return finding("crash", f"raises {describe_exception(error)}", case)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether both have the same bits, except that all NaN are equal, and 0 and -0."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
