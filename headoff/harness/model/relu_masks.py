"""ReLU activation masks: which hidden units the ReLUs of encoder, decoder and box head let through.

Relevance is made of gradients, and the gradient of a ReLU jumps where its input crosses zero. Where a hidden unit is
nearer to zero than a dtype resolves, right implementations switch it on or off by their rounding, and their maps differ
as much as maps of different heads do: in float32 in 4 of the 90 cases of the bundled scenes, in bfloat16 in all of
them. A tolerance that admits this admits anything. So two runs are compared with one and the same mask, and what is
left to compare is smooth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from headoff.detr.detector import Detr
from headoff.detr.transformer import FeedForward


class ReluMasks:
    """Masks of one run of a detector, ReLU by ReLU, in the order of the calls.

    A "copy" is the (rows, units) of one image in one run of the decoder: a call has as many as its leading dimensions
    make together. Masks recorded on a batch of configurations can be pinned on runs that batch them differently, as
    long as the order of the copies is the same.

    Args:
        masks: by the name of the linear layer in front of the ReLU, bool (copies, rows, units).
    """

    def __init__(self, masks: dict[str, Tensor] | None = None) -> None:
        self.masks = {} if masks is None else masks

    def __getitem__(self, copies: Sequence[int]) -> ReluMasks:
        """The masks of some of the copies, of the configurations for instance."""
        return ReluMasks({name: mask[list(copies)] for name, mask in self.masks.items()})

    @contextmanager
    def recording(self, detector: Detr) -> Iterator[None]:
        """Append the masks of all calls in this context. What is computed does not change."""
        recorded: dict[str, list[Tensor]] = {name: [mask] for name, mask in self.masks.items()}

        def record(name: str, hidden: Tensor) -> None:
            recorded.setdefault(name, []).append(hidden.detach().flatten(0, -3) > 0)

        with _hooked(detector, record):
            yield
        self.masks = {name: torch.cat(masks) for name, masks in recorded.items()}

    @contextmanager
    def pinned(
        self, detector: Detr, *, resolution: float | None = None, box_head: bool = True
    ) -> Iterator[None]:
        """Make the ReLUs of `detector` use these masks, from the first copy on; nothing else changes.

        Args:
            detector: of the same sizes as the recorded one, in any dtype on any device.
            resolution: align only units that are below so many times the root mean square of their row, as rounding
                decides those; the others keep their own side of zero. None pins every unit.
            box_head: whether the ReLUs of the box head are pinned as well.
        """
        position = dict.fromkeys(self.masks, 0)

        def pin(name: str, hidden: Tensor) -> Tensor:
            if name.startswith("box_head") and not box_head:
                return hidden
            copies = hidden[..., 0, 0].numel()
            mask = self.masks[name][position[name] : position[name] + copies]
            position[name] += copies
            mask = mask.to(hidden.device).reshape(hidden.shape)
            values = hidden.detach()
            least = torch.finfo(hidden.dtype).tiny
            if resolution is None:
                pinned = torch.where(mask, values.clamp(min=least), values.clamp(max=0))
            else:
                mirrored = torch.where(mask, values.abs().clamp(min=least), -values.abs())
                root_mean_square = values.square().mean(-1, keepdim=True).sqrt()
                pinned = torch.where(values.abs() < resolution * root_mean_square, mirrored, values)
            return pinned + (hidden - values)  # the second term is 0, and carries the gradient

        with _hooked(detector, pin):
            yield


@contextmanager
def _hooked(detector: Detr, act: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `act(name, output)` after each layer in front of a ReLU; the output is what it returns, unless None."""
    layers: dict[str, nn.Module] = {
        f"{name}.expand": module.expand
        for name, module in detector.named_modules()
        if isinstance(module, FeedForward)
    }
    for index, (layer, after) in enumerate(pairwise(detector.box_head)):
        if isinstance(after, nn.ReLU):
            layers[f"box_head.{index}"] = layer
    handles = [
        layer.register_forward_hook(lambda _module, _inputs, output, name=name: act(name, output))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
