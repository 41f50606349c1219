"""The attention under test, on the device and in the dtype it is tested in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from headoff.attention import Attention, resolve_attention
from headoff.harness.settings import Settings


@dataclass(frozen=True)
class Patch:
    """What the suites are given as `under_test`.

    - `attention`: the callable, adapted to the contract where it does not apply gates itself
    - `label`: as it was asked for
    - `device`, `dtype`, `seed`: it is tested on and with
    - `unsupported`: dtypes that it refuses, with what it says; filled while the suites run
    - `calls`: how often it was called in the model, by site; likewise
    """

    attention: Attention
    label: str
    device: torch.device
    dtype: torch.dtype
    seed: int
    settings: Settings
    unsupported: dict[str, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, settings: Settings) -> Patch:
        """Raises AttentionError where there is no such attention."""
        return cls(
            resolve_attention(settings.attention),
            settings.attention,
            torch.device(settings.device),
            settings.torch_dtype,
            settings.seed,
            settings,
        )

    def take_calls(self) -> dict[str, int]:
        """The calls since this was asked last."""
        taken = dict(self.calls)
        self.calls.clear()
        return taken
