"""Where gradients jump: hidden units that a ReLU lets through or not, by the last digit of a sum.

Relevance is made of gradients, and the gradient of a ReLU jumps where its input crosses zero. Where a hidden unit comes
nearer to zero than a dtype resolves, implementations that are equally right switch it on or off by their rounding, and
their maps differ by as much as maps of different heads do: in float32 in 4 of the 90 cases of the bundled scenes, in
bfloat16 in all of them. To allow for that would be to allow for anything. So candidate and truth are made to decide
alike, and then only what is smooth is left to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from headoff.detr.detector import Detector, Features
from headoff.detr.sharing import LayerGates, SharingPlan
from headoff.detr.transformer import FeedForward
from headoff.gates import Configuration, Gates, stack
from headoff.sweeps import by_encoder_gate


class Decisions:
    """Which hidden units the ReLUs of encoder and decoder let through, for several configurations of one image.

    A right implementation may decide otherwise where a unit is zero but for rounding, and then its gradients jump. To
    be compared, gradients are to be those of one and the same piece of a piecewise smooth function: that of the truth.

    - `on`: per ReLU (by the name of the linear layer in front of it), bool (C, rows, units)
    """

    def __init__(self, on: dict[str, Tensor]) -> None:
        self.on = on

    def __getitem__(self, chosen: slice | list[int]) -> Decisions:
        """Those of some of the configurations."""
        return Decisions({name: each[chosen] for name, each in self.on.items()})

    @classmethod
    @torch.no_grad()
    def of(cls, detector: Detector, features: Features, configurations: Sequence[Configuration]) -> Decisions:
        """As `detector` decides; `features` of one image."""
        gates = stack(configurations, detector.head_layout)
        found: dict[str, list[Tensor]] = {}
        order: list[Tensor] = []
        positions = detector.query_embedding.weight
        for encoder_gate, members in by_encoder_gate(gates):
            with _watched(detector) as seen:
                memory = detector.encode_features(features, encoder_gate)
                states = detector.decoder(
                    positions.new_zeros(1, 1, *positions.shape),
                    positions,
                    memory.tokens,
                    memory.positions,
                    detector.attend,
                    memory.attn_mask,
                    _apart(gates[members], detector.config.decoder_layers),
                    every_layer=False,
                )
                detector.heads(states[-1])
            for name, hidden in seen.items():
                on = hidden.flatten(0, -3) > 0
                found.setdefault(name, []).append(on.expand(len(members), -1, -1).cpu())
            order.append(members)
        back = torch.cat(order).argsort()
        return cls({name: torch.cat(each)[back] for name, each in found.items()})

    @contextmanager
    def imposed_on(self, detector: Detector, *, boxes: bool = False) -> Iterator[None]:
        """Let the ReLUs of `detector` decide as these do, and change nothing else.

        Configurations are taken in order, as many in a call as it has copies of the rows, each once in every layer.
        ReLUs of the box head are let alone unless `boxes`.
        """
        handles = []
        for name, layer in _before_relus(detector).items():
            if boxes or not name.startswith("box_head"):
                hook = _Side(self.on[name].to(detector.device))
                handles.append(layer.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Side:
    """A forward hook that moves hidden units to the side of zero where they are to be; gradients pass unchanged."""

    def __init__(self, on: Tensor) -> None:
        self._on = on
        self._next = 0

    def __call__(self, _module: nn.Module, _inputs: object, hidden: Tensor) -> Tensor:
        copies = hidden[..., 0, 0].numel()
        on = self._on[self._next : self._next + copies].reshape(hidden.shape)
        self._next += copies
        least = torch.finfo(hidden.dtype).tiny
        sided = torch.where(on, hidden.clamp(min=least), hidden.clamp(max=0))
        return sided.detach() + (hidden - hidden.detach())  # sided's value, which the second term adds 0 to


@contextmanager
def _watched(detector: Detector) -> Iterator[dict[str, Tensor]]:
    """What comes into each ReLU, by the name of the layer that it comes from."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, hidden: Tensor) -> None:
            seen[name] = hidden

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in _before_relus(detector).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _before_relus(detector: Detector) -> dict[str, nn.Module]:
    """The linear layers that ReLUs come after, but for the backbone's."""
    found: dict[str, nn.Module] = {
        f"{name}.expand": module.expand
        for name, module in detector.named_modules()
        if isinstance(module, FeedForward)
    }
    for index, (layer, after) in enumerate(pairwise(detector.box_head)):
        if isinstance(after, nn.ReLU):
            found[f"box_head.{index}"] = layer
    return found


def _apart(gates: Gates, layers: int) -> SharingPlan:
    """A plan under which every configuration is a run of its own from the start, in order."""
    count = len(gates)

    def steps(gate: Tensor | None, first: Tensor | None) -> tuple[LayerGates, ...]:
        return tuple(
            LayerGates(first if layer == 0 else None, None if gate is None else gate[:, layer])
            for layer in range(layers)
        )

    from_one = torch.zeros(count, dtype=torch.long)
    return SharingPlan(
        steps(gates.decoder_self, from_one),
        steps(gates.decoder_cross, None),
        torch.arange(count),
        (count,) * layers,
    )
