"""Side effects of deformable attention: the checks of `headoff.harness.operator`, on cases of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

from headoff.deformable import grid_sample_attention
from headoff.harness.deformable.call import DeformableTensors
from headoff.harness.deformable.cases import THREE, DeformableCase
from headoff.harness.finding import Finding
from headoff.harness.operator import side_effects
from headoff.harness.operator.call import Tensors
from headoff.harness.operator.cases import Case, Fields
from headoff.harness.operator.compare import unsupported_dtype
from headoff.harness.operator.side_effects import SideEffect, Trial, findings_of_trial

PLAIN = DeformableCase(name="plain", inputs="inside")

SEQUENCE: tuple[Fields, ...] = (
    {},
    {"seed": 1},
    {"gate": "none"},
    {"gate": "binary"},
    {"inputs": "outside"},
    {"weight_kind": "any"},
    {"queries": 40},
    {"queries": 5},
    # As many tokens in other levels.
    {"shapes": ((6, 8), (3, 4), (2, 2))},
    {"shapes": ((2, 2), (4, 3), (8, 6))},
    {"shapes": ((8, 8),), "points": 12},
    {"points": 2},
    {"layout": "heads first"},
    {"layout": "reversed"},
    {"batch": 4, "heads": 2},
    {"batch": 1, "heads": 8},
    {"channels": 64},
    {"channels": 8},
    {"gate": "all off"},
    {"seed": 2},
    {},
)
"""Calls that differ from the one before in contents, gate, levels, sizes or strides. `seed` is added to the trial's."""


class DeformableTrial(Trial):
    """As `Trial`, whose `own_size` is the number of queries."""

    sequence: ClassVar[tuple[Fields, ...]] = SEQUENCE
    oracle: ClassVar[Any] = staticmethod(grid_sample_attention)

    def case(self, **fields: Any) -> Case:
        """A case of moderate, ragged sizes with a gate, changed by `fields`."""
        usual: Fields = {
            "name": self.check,
            "batch": 2,
            "heads": 3,
            "queries": self.own_size,
            "channels": 8,
            "points": 3,
            "gate": "full",
            "seed": self.seed,
            "dtype": self.dtype,
        }
        return DeformableCase(**{**usual, **fields})

    def may_differ(self, name: str, tensors: Tensors) -> bool:
        """On a GPU, that of the value: every published kernel adds it up with atomics, in any order."""
        return self.device.type != "cpu" and name == "dv"

    def unsupported_dtype(self, dtype: torch.dtype) -> str | None:
        return unsupported_dtype(self.attention, dtype, self.device, PLAIN)

    def fresh(self, case: Case, **fields: Any) -> Case:
        """With another level as well: what is kept of the levels may be kept by the number of tokens."""
        assert isinstance(case, DeformableCase)
        return super().fresh(case, shapes=(*case.shapes, (7, 9)), **fields)

    def one_item_more(self, tensors: DeformableTensors, case: Case) -> Tensors:
        batch = case.batch
        more: dict[str, Any] = {
            name: torch.cat((tensor, tensor[:1])) if tensor.shape[0] == batch else tensor
            for name, tensor in tensors.named().items()
        }
        return replace(tensors, **more)


def gate_left_out(trial: Trial, case: Case) -> list[Finding]:
    """The gate may be left out."""
    tensors = trial.tensors(case)
    value, locations, weights = tensors.inputs
    return trial.wrong(case, {"context": trial.attention(value, tensors.spatial_shapes, locations, weights)})


CASES: dict[str, tuple[Fields, ...]] = {
    "inputs-untouched": (
        {},
        {"layout": "sliced", "grad_context": "every second"},
        {"layout": "heads first", "gate": "all off", "inputs": "outside"},
        {"gate": "none", "weight_kind": "any"},
        {"gate": "binary", "grad_context": "ones"},
    ),
    "context-owns-memory": (
        {},
        {"gate": "none", "layout": "heads first"},
        {"queries": 1, "batch": 1, "points": 1, "shapes": ((3, 3),), "gate": "none"},
        {"gate": "all off"},
        {"layout": "expanded value", "gate": "scalar"},
    ),
    "results-stay": ({}, {"gate": "none"}, {"gate": "fractions"}),
    "memory-released": ({}, {"gate": "none"}),
    "repeatable": (
        {},
        {"gate": "none"},
        # Many points on few tokens, whose gradients kernels add up in any order.
        {"shapes": ((2, 2), (1, 1)), "queries": 130, "inputs": "inside"},
        {"batch": 1, "heads": 2, "queries": 1100, "gate": "fractions"},
    ),
    "number-of-threads": ({}, {"gate": "none"}),
    "random-state": ({},),
    "gradient-modes": ({}, {"queries": 1, "gate": "fractions"}, {"queries": 130, "gate": "none"}),
    "first-call-without-gradients": tuple(
        {"gate": gate, "channels": 56, "shapes": (*THREE, (5, 7))} for gate in ("full", "none")
    ),
    "changing-calls": ({},),
    "changed-contents": ({},),
    "crossed-backward": ({}, {"gate": "none"}, {"gate": "fractions"}),
    "gate-gradient": tuple({"gate": gate} for gate in ("full", "fractions", "per item", "scalar")),
}
"""The cases of the checks that both contracts have."""

SIDE_EFFECTS: dict[str, SideEffect] = {
    "gate-left-out": SideEffect(gate_left_out, ({"gate": "none"},), False),
    **{name: replace(side_effects.SIDE_EFFECTS[name], cases=cases) for name, cases in CASES.items()},
}
"""The checks by name."""


def side_effect_findings(
    attention: Any, name: str, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> list[Finding]:
    """What is wrong with `attention` by the check `name` of `SIDE_EFFECTS`; nothing where it is right.

    Raises:
        SettingError: there is no such check.
    """
    return findings_of_trial(DeformableTrial, SIDE_EFFECTS, attention, name, dtype, device, seed)
