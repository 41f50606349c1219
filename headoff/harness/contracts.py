"""The two kinds of attention that the harness tests, and what differs between them.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headoff.errors import SettingError, did_you_mean


@dataclass(frozen=True)
class Contract:
    """A kind of attention under test.

    Attributes:
        name: as `--contract` has it.
        default: name of the attention that is tested where none is named, and of the baseline.
        suites: names of the suites that test it, in the order they are best read in; the last one times it.
    """

    name: str
    default: str
    suites: tuple[str, ...]

    @property
    def benchmark(self) -> str:
        return self.suites[-1]

    def resolve(self, spec: str | Callable[..., Any]) -> Any:
        """The attention that `spec` names. Raises AttentionError where there is none."""
        if self is DEFORMABLE:
            from headoff.deformable import resolve_deformable_attention

            return resolve_deformable_attention(spec)
        from headoff.attention import resolve_attention

        return resolve_attention(spec)

    def registered(self) -> tuple[str, ...]:
        """Names that `resolve` knows without importing anybody's code."""
        if self is DEFORMABLE:
            from headoff.deformable import deformable_attention_names

            return deformable_attention_names()
        from headoff.attention import attention_names

        return attention_names()


DENSE = Contract(
    "dense",
    "sdpa",
    (
        "operator",
        "calls",
        "detections",
        "relevance",
        "gradients",
        "importance",
        "family",
        "checks",
        "benchmark",
    ),
)
DEFORMABLE = Contract("deformable", "grid_sample", ("deformable", "family", "checks", "deformable_benchmark"))
CONTRACTS = {contract.name: contract for contract in (DENSE, DEFORMABLE)}


def contract_named(name: str) -> Contract:
    """Raises SettingError, one sentence, for a name that is not known."""
    if name not in CONTRACTS:
        raise SettingError(
            f"there is no contract {name!r}{did_you_mean(name, CONTRACTS)}: use {' or '.join(CONTRACTS)}"
        )
    return CONTRACTS[name]


CHECKS_SUITE = "checks"
"""The suite that runs only what was asked for by name."""

BACKWARD = ("gradients",)
"""Suites of the backward pass alone."""

OWN_MODEL = ("detections", "relevance", "gradients", "importance", "benchmark")
"""Suites that need headoff's own DETR as the model."""

FAMILY_MODEL = ("family",)
"""Suites that need a model of transformers."""


def is_of_contract(suite: str, contract: Contract) -> bool:
    """Whether a suite tests attention of this contract; somebody's own suite is run with either."""
    return suite in contract.suites or not any(suite in other.suites for other in CONTRACTS.values())


def is_under_test(suite: str, contract: Contract, is_of_family: bool, forward_only: bool) -> bool:
    """Whether a suite tests attention of this contract, in such a model, and of its forward pass if that is all."""
    of_pass = not (forward_only and suite in BACKWARD)
    return is_of_contract(suite, contract) and suits_model(suite, is_of_family) and of_pass


def suits_model(suite: str, is_of_family: bool) -> bool:
    """Whether a suite can test the attention in such a model: one of transformers, or headoff's own DETR."""
    return suite not in (OWN_MODEL if is_of_family else FAMILY_MODEL)
