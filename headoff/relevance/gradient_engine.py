"""Methods that need only the gradient of the target with respect to what the encoder starts from.

- `gradient_input`: the gradient at the image tokens after the backbone's projection, times the tokens, summed over
  channels (Shrikumar et al., arXiv 1605.01713).
- `integrated_gradients`: the same with the gradient's mean on the straight line from a baseline to the tokens
  (Sundararajan, Taly, Yan, ICML 2017, equation 1). The baseline is tokens of zero, which keep their positions. Maps
  sum to the target's value minus its value at the baseline (completeness), up to the error of the quadrature
  (Gauss-Legendre).
- `gradcam_backbone`: Grad-CAM (Selvaraju et al., ICCV 2017, equations 1 and 2) of the backbone's last feature map A:
  relu(sum over channels k of alpha_k A_k), where alpha_k is the mean over the image of the gradient at A_k.

A map after decoder layer m is computed from the part of the gradient that reaches the image through the cross-attention
of layers 0..m. Parts of single layers add up to the whole gradient, which is that after the last layer. Every layer
costs one more backward pass of the encoder; with the last layer alone there is one.

For models of transformers the tokens are the cells of the feature maps that their backbone module returns, on all
levels (for Grad-CAM the last one). Where such a model chooses its object queries from the image, another image, as on
the path of the integral, may have other queries in the same places: then maps need not sum to the difference of the
values.

Shapes: P targets, M layers, S steps of the integral, n tokens of a level, d channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from headoff.calls import Attend, AttentionCall, Call
from headoff.detector import Detector
from headoff.detr.detector import Detr, Features
from headoff.errors import SettingError
from headoff.gates import Gates
from headoff.relevance.autograd_engine import GRAPH
from headoff.relevance.decoded import Decoded, constant_replacement, decoded
from headoff.relevance.engine import ConfigurationRelevance, TargetsOf, check_one_image, sees_image
from headoff.relevance.memory import chosen_memory_budget
from headoff.relevance.methods import EngineMethod, register_method

STEPS = 64
"""Steps of the integral by default."""


@dataclass(frozen=True)
class _Input:
    """What gradients are computed with respect to, of one image: the tokens of L levels.

    Attributes:
        levels: L tensors (n, d), whose sizes may differ.
        encode: from such tokens of S images, (S, n, d) each, and the encoder's gate, to their memory.
        to_memory: from rows (..., n) of each level to rows over the memory's tokens.
        is_image: of the last level, (n,) bool, False for padding; None where nothing is padded.
        offset: (d,) or 0, what a token of zero features is.
    """

    levels: list[Tensor]
    encode: Callable[[list[Tensor], Tensor | None], Any]
    to_memory: Callable[[list[Tensor]], Tensor] = lambda rows: rows[0]
    is_image: Tensor | None = None
    offset: Tensor | float = 0.0


@dataclass
class _KeysAndValues:
    """Records keys and values of cross-attention, by layer: how a decoder layer sees the memory."""

    layers: dict[int, list[Tensor]] = field(default_factory=dict)

    def __call__(self, call: Call, proceed: Attend) -> Tensor:
        if call.address.site == "decoder_cross":
            seen = [call.key, call.value] if isinstance(call, AttentionCall) else [call.value]
            self.layers[call.address.layer] = [x for x in seen if x.requires_grad]
        return proceed(call)


class GradientEngine:
    """Gradient times input, integrated along a path; see `RelevanceEngine` for `run`.

    Args:
        detector: in evaluation mode, with frozen weights.
        features: of one image, padded or not.
        method: the `EngineMethod`.
        picture: is not used.
        memory_budget: bytes, see `RelevanceEngine`. It determines how many steps are computed together.
        steps: of the integral from tokens of zero; None for the gradient at the tokens themselves.

    Raises:
        SettingError: the detector does not show what its encoder starts from, there is more than one image, or `steps`
            is not positive.
    """

    def __init__(
        self,
        detector: Detector,
        features: Any,
        *,
        method: EngineMethod,
        picture: Image.Image | None = None,
        memory_budget: int | None = None,
        steps: int | None = None,
    ) -> None:
        check_one_image(features)
        self.detector = detector
        self.features = features.clone()  # tensors of inference mode cannot be saved for a backward pass
        self.method = method
        self._input = self._make_input()
        self._compute = torch.promote_types(detector.dtype, torch.float32)
        self._budget = chosen_memory_budget(detector.device, memory_budget)
        at, weights = (np.ones(1), np.ones(1)) if steps is None else _quadrature(steps)
        self._steps = [torch.as_tensor(x, dtype=self._compute, device=detector.device) for x in (at, weights)]
        self._encoded: tuple[Any, list[Tensor], Any] | None = None

    def run(
        self, gates: Gates, targets: TargetsOf, *, layers: Sequence[int] | None = None, heads: bool = False
    ) -> Iterator[ConfigurationRelevance]:
        """Decode and explain every configuration; see `RelevanceEngine.run`."""
        count = self.detector.head_layout.decoder_layers
        chosen = list(range(count)) if layers is None else list(layers)
        for one in decoded(self.detector, self.features, gates, targets, chosen, heads, self._budget):
            yield one.result(self._input.to_memory(self._rows(one, chosen)), chosen)

    def _make_input(self) -> _Input:
        if isinstance(self.detector, Detr):
            return _tokens_of(self.detector, self.features)
        return _feature_maps_of(self.detector, self.features, self.method)

    def _rows(self, one: Decoded, layers: list[int]) -> list[Tensor]:
        """Rows (P, M, n) of the targets of one configuration, for each level."""
        return [
            (gradients * tokens.to(self._compute)).sum(-1)
            for gradients, tokens in zip(self._gradients(one, layers), self._input.levels, strict=True)
        ]

    def _gradients(self, one: Decoded, layers: list[int]) -> list[Tensor]:
        """Gradients (P, M, n, d) of the targets, as weighted sums over the steps, for each level."""
        targets = one.present
        gradients = [
            torch.zeros(len(targets), len(layers), *tokens.shape, dtype=self._compute, device=tokens.device)
            for tokens in self._input.levels
        ]
        # With all cross-attention off nothing comes from the image.
        if not targets or not sees_image(one.gates)[0]:
            return gradients
        plan = self.detector.plan(one.gates)
        at_once = max(1, self._budget // 2 // self._step_bytes())
        with torch.enable_grad(), constant_replacement(self.detector):
            for at, weights in zip(*(x.split(at_once) for x in self._steps), strict=True):
                leaves, memory = self._encode(at, one.encoder_gate)
                seen = _KeysAndValues()
                with self.detector.intercepting(seen):
                    output = self.detector.decode(memory, plan)
                for slot, target in enumerate(targets):
                    values = [
                        target.value(output.logits[0, step], output.boxes[0, step]) * weight
                        for step, weight in enumerate(weights)
                    ]
                    # Images do not depend on each other, so the gradient of the sum is that of each image's value.
                    parts = _parts(torch.stack(values).sum(), leaves, seen.layers, layers)
                    for layer, part in enumerate(parts):
                        for level, gradient in zip(gradients, part, strict=True):
                            level[slot, layer] += gradient.to(self._compute).sum(0)
        return gradients

    def _encode(self, at: Tensor, gate: Tensor | None) -> tuple[list[Tensor], Any]:
        """The tokens at some steps, (S, n, d) for each level, and their memory. The latest is cached."""
        if self._encoded is not None:
            key, leaves, memory = self._encoded
            if key[0] is gate and torch.equal(key[1], at):
                return leaves, memory
        self._encoded = None
        leaves = [(at.to(tokens)[:, None, None] * tokens).requires_grad_() for tokens in self._input.levels]
        memory = self._input.encode(leaves, gate)
        self._encoded = (gate, at), leaves, memory
        return leaves, memory

    def _step_bytes(self) -> int:
        """Bytes of the graph of one step, about: the encoder's activations and attention weights, and the decoder."""
        layout = self.detector.head_layout
        tokens = sum(h * w for h, w in self.features.shapes)
        width = max(level.shape[-1] for level in self._input.levels)
        heads = layout.heads_at("encoder_self") or 1
        encoder = layout.encoder_layers * tokens * (20 * width + heads * tokens) * self._compute.itemsize
        return encoder + GRAPH * self.detector.decoder_bytes(self.features)


class GradCamEngine(GradientEngine):
    """Grad-CAM of the backbone's last feature map; see `GradientEngine`.

    A DETR's tokens are a linear function of that map, x = W A + b, so that the sum over k of alpha_k A_k is
    (W^T g) A = g (x - b) with the mean g of the gradient at the tokens: the backbone need not run again. The mean is
    over the image, and padding has no relevance. Of a model of transformers, the last feature map is that of its
    module `backbone`.
    """

    def _make_input(self) -> _Input:
        if isinstance(self.detector, Detr):
            return _tokens_of(self.detector, self.features)
        return _feature_maps_of(self.detector, self.features, self.method, last=True)

    def _rows(self, one: Decoded, layers: list[int]) -> list[Tensor]:
        (level,), is_image = self._input.levels, self._input.is_image
        tokens = (level - self._input.offset).to(self._compute)
        (gradients,) = self._gradients(one, layers)
        if is_image is None:
            return [(gradients.mean(2, keepdim=True) * tokens).sum(-1).relu()]
        mean = gradients[:, :, is_image].mean(2, keepdim=True)
        return [(mean * tokens).sum(-1).relu() * is_image]


def _tokens_of(detector: Detr, features: Features) -> _Input:
    def encode(levels: list[Tensor], gate: Tensor | None) -> Any:
        (tokens,) = levels
        images = len(tokens)
        mask = features.attn_mask
        return detector.encode_features(
            Features(
                tokens,
                features.positions.expand(images, -1, -1),
                None if mask is None else mask.expand(images, -1, -1, -1),
                features.grid,
            ),
            gate,
        )

    is_image = None if features.attn_mask is None else features.attn_mask.flatten()
    bias = detector.input_projection.bias
    assert bias is not None
    return _Input([features.tokens[0]], encode, is_image=is_image, offset=bias.detach())


def _feature_maps_of(
    detector: Detector, features: Any, method: EngineMethod, *, last: bool = False
) -> _Input:
    """Tokens that are the cells of the backbone's feature maps, or of the last one: levels of the memory.

    Levels of the memory that have no map of their size, as they are computed from another level, get no relevance.
    """
    if not hasattr(features, "feature_maps"):
        raise SettingError(
            f"{method.name} needs the backbone's feature maps, which this detector does not show: use d_rise or a "
            "method of attention such as chefer"
        )
    maps = [feature_map for feature_map, _ in features.feature_maps]
    chosen = list(range(len(maps)))[-1 if last else 0 :]
    grids = [tuple(maps[index].shape[-2:]) for index in chosen]
    if not all(grid in features.shapes for grid in grids):
        sizes = ", ".join(f"{h} x {w}" for h, w in grids)
        raise SettingError(
            f"the backbone's feature maps are {sizes}, which levels of the memory are not: use d_rise or a method of "
            "attention such as chefer"
        )

    def encode(levels: list[Tensor], gate: Tensor | None) -> Any:
        changed = [feature_map.expand(len(levels[0]), -1, -1, -1) for feature_map in maps]
        for index, tokens in zip(chosen, levels, strict=True):
            changed[index] = tokens.transpose(1, 2).unflatten(2, maps[index].shape[-2:])
        return detector.encode_features(features.with_feature_maps(changed), gate)

    def to_memory(rows: list[Tensor]) -> Tensor:
        by_grid = dict(zip(grids, rows, strict=True))
        return torch.cat(
            [
                by_grid[shape]
                if shape in by_grid
                else rows[0].new_zeros(*rows[0].shape[:-1], math.prod(shape))
                for shape in features.shapes
            ],
            dim=-1,
        )

    mask = None if features.pixel_mask is None else features.feature_maps[-1][1][0].flatten()
    return _Input([maps[index][0].flatten(1).T for index in chosen], encode, to_memory, mask)


def _parts(
    total: Tensor, leaves: list[Tensor], seen: dict[int, list[Tensor]], layers: list[int]
) -> Iterator[list[Tensor]]:
    """Gradients of `total` at the leaves after each layer: the part through keys and values of layers up to it."""
    if layers == [max(seen)]:
        yield _gradients_at(leaves, [total], None)
        return
    inputs = [x for layer in sorted(seen) for x in seen[layer]]
    given = iter(torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True))
    added = {
        layer: [(x, gradient) for x in seen[layer] if (gradient := next(given)) is not None]
        for layer in sorted(seen)
    }
    for layer in layers:
        pairs = [pair for earlier in range(layer + 1) for pair in added[earlier]]
        yield _gradients_at(leaves, [x for x, _ in pairs], [gradient for _, gradient in pairs])


def _gradients_at(
    leaves: list[Tensor], outputs: list[Tensor], gradients: list[Tensor] | None
) -> list[Tensor]:
    """Gradients at the leaves from those of the outputs; zeros at leaves that these do not depend on."""
    if not outputs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(outputs, leaves, gradients, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, found, strict=True)
    ]


def _quadrature(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Points in 0..1 and weights of Gauss-Legendre quadrature."""
    if steps < 1:
        raise SettingError(f"integrated gradients need at least 1 step, not {steps}")
    points, weights = np.polynomial.legendre.leggauss(steps)
    return (points + 1) / 2, weights / 2


def integrated_gradients(steps: int = STEPS) -> EngineMethod:
    """The method `integrated_gradients` with another number of steps of the integral.

    Example:
        >>> explain(detector, "street.jpg", method=integrated_gradients(steps=128), layers="last")
    """
    return replace(_INTEGRATED, engine=partial(GradientEngine, steps=steps))


register_method(
    EngineMethod(
        "gradient_input",
        "gradient of the target at the image tokens that the encoder starts from, times the tokens",
        GradientEngine,
        signed=True,
    )
)
_INTEGRATED = register_method(
    EngineMethod(
        "integrated_gradients",
        "integrated gradients at the same tokens, from a baseline of zero tokens",
        partial(GradientEngine, steps=STEPS),
        signed=True,
    )
)
register_method(
    EngineMethod("gradcam_backbone", "Grad-CAM of the backbone's last feature map", GradCamEngine)
)
