"""Gradients that can be compared: the oracle's ReLUs follow the patch's where rounding decides.

The gradient of a ReLU jumps where its input crosses zero. A hidden unit whose input is zero but for rounding is let
through by one right implementation and held back by another, and their gradients differ by far more than rounding. So
it is noted on which side of zero each unit was in the run that is to be checked, and the oracle takes the same side
where it cannot tell itself. Where it can, the patch has to be right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from headoff.detr.detector import Detector
from headoff.detr.transformer import FeedForward


class ReluSides:
    """Which units the ReLUs of encoder, decoder and box head let through, layer by layer, call by call."""

    def __init__(self) -> None:
        self._on: dict[str, list[Tensor]] = {}

    @contextmanager
    def noted(self, detector: Detector) -> Iterator[None]:
        """Note those of the calls made in this context. What is computed is not touched."""
        with _hooked(detector, self._note):
            yield

    @contextmanager
    def followed(self, detector: Detector, resolution: float) -> Iterator[None]:
        """Have `detector`, of the same sizes, take the noted sides in the same calls, where it cannot tell itself.

        It cannot where a unit is below `resolution` times the root mean square of its row. It is then mirrored at zero
        if need be; its gradient stays that of an identity.
        """
        calls = {name: iter(each) for name, each in self._on.items()}

        def follow(name: str, hidden: Tensor) -> Tensor:
            on = next(calls[name])
            scale = hidden.detach().square().mean(-1, keepdim=True).sqrt()
            least = torch.finfo(hidden.dtype).tiny
            mirrored = torch.where(on, hidden.abs().clamp(min=least), -hidden.abs()).detach()
            sided = mirrored + (hidden - hidden.detach())  # the second term is 0 and carries the gradient
            return torch.where(hidden.abs() < resolution * scale, sided, hidden)

        with _hooked(detector, follow):
            yield

    def _note(self, name: str, hidden: Tensor) -> None:
        self._on.setdefault(name, []).append(hidden.detach() > 0)


@contextmanager
def _hooked(detector: Detector, act: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `act(name, output)` after each layer in front of a ReLU; what it returns, if anything, is the output."""
    handles = [
        layer.register_forward_hook(lambda _module, _inputs, output, name=name: act(name, output))
        for name, layer in _before_relus(detector)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before_relus(detector: Detector) -> Iterator[tuple[str, nn.Module]]:
    """Layers that a ReLU comes after, but for the backbone's: no gradient goes there."""
    for name, module in detector.named_modules():
        if isinstance(module, FeedForward):
            yield name, module.expand
    for layer, (module, after) in enumerate(pairwise(detector.box_head)):
        if isinstance(after, nn.ReLU):
            yield f"box_head.{layer}", module
