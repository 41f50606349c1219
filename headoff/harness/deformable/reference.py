"""What a case's context and gradients are, in float64, and how far rounding alone can move each of their elements.

By the definition, without autograd. For one batch item and head, with the gate g, the weight a of a point, the four
values V00, V10, V01, V11 (x before y) around it, and the fractions x and y of its place between them:

    S        = (1-x)(1-y) V00 + x(1-y) V10 + (1-x)y V01 + xy V11         context = sum over points of g a S
    dS/dx    = (1-y) (V10 - V00) + y (V11 - V01)                         dS/dy likewise
    dV[t]    = sum over points and corners on t of g a w dO              dweights   = g dO . S
    dlocations = g a (w dO . dS/dx, h dO . dS/dy)

Cells outside the level have the value 0. Scales are as in `headoff.harness.operator.reference`: the root of the sum of
squares of the errors of everything that an element is computed from, in units of the dtype's eps. The error of a
position in cells, which all else depends on, is that of location * size - 0.5 or of the same by way of
`grid_sample`'s coordinates from -1 to 1. An element whose scale is 0 (a head that is off, a point outside, a token that
no point reaches) must be exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headoff.deformable import corners, level_tensors
from headoff.harness.deformable.call import DeformableTensors
from headoff.harness.deformable.cases import GRADIENTS, WANTED, DeformableCase
from headoff.harness.operator.reference import Truth, truth_for

CORNERS = 4
FACTORS = 4
"""Numbers that a term is a product of, each rounded once: gate, weight, bilinear weight, value or gradient."""


@truth_for.register
def _(tensors: DeformableTensors, case: DeformableCase) -> Truth:
    eps, tiny = torch.finfo(case.dtype).eps, torch.finfo(case.dtype).tiny
    underflow = tiny if case.dtype == torch.float16 else max(tiny / eps, 1e-150)
    accumulation = (min(eps, torch.finfo(torch.float32).eps) / eps) ** 2

    def summed(squares: Tensor, value: Tensor, terms: int | Tensor) -> Tensor:
        """The squared error of a sum: `squares`, those of its terms, and what accumulating and rounding it adds."""
        return (1 + terms * accumulation) * (squares + value.square()) + underflow**2 * (squares > 0).double()

    exact = tensors.double()
    value, grad_context = exact.value, exact.grad_context
    shapes = level_tensors(tensors.spatial_shapes, torch.device("cpu"))[0].double()
    size = shapes.flip(1)[:, None]  # (L, 1, 2): w, h
    position = exact.sampling_locations * size - 0.5
    x, y = (position - position.floor()).unbind(-1)  # (B, Q, H, L, P)
    # By grid_sample's coordinates a quarter of the size is rounded, even where the position is near 0.
    x_errors2, y_errors2 = (
        (exact.sampling_locations * size).square() + position.square() + (size / 4).square() + 0.25
    ).unbind(-1)
    both_errors2 = x_errors2 * y_errors2 * eps**2
    tokens, bilinear = corners(tensors.spatial_shapes, exact.sampling_locations)
    inside = torch.stack([_inside(position + torch.tensor(offset), size) for offset in _OFFSETS], -1)

    batch, queries, heads, levels, points = x.shape
    index = tokens.transpose(1, 2).reshape(batch, heads, -1)[..., None].expand(-1, -1, -1, case.channels)
    around = value.transpose(1, 2).gather(2, index)
    around = around.view(batch, heads, queries, levels, points, CORNERS, case.channels).transpose(1, 2)
    around = around * inside[..., None]  # (B, Q, H, L, P, 4, D)
    v00, v10, v01, v11 = around.unbind(-2)
    x_, y_ = x[..., None], y[..., None]
    along_x = (1 - y_) * (v10 - v00) + y_ * (v11 - v01)
    along_y = (1 - x_) * (v01 - v00) + x_ * (v11 - v10)
    across = v11 - v10 - v01 + v00
    sampled = (bilinear[..., None] * around).sum(-2)  # (B, Q, H, L, P, D)
    sampled_terms2 = FACTORS * (bilinear[..., None] * around).square().sum(-2)

    on = torch.ones(1, 1, 1, 1, dtype=torch.float64) if exact.gate is None else exact.gate
    gate = on[..., None]
    gated = gate * exact.attention_weights  # (B, Q, H, L, P)
    gated2 = gated.square()
    sampled_errors2 = (
        sampled_terms2
        + along_x.square() * x_errors2[..., None]
        + along_y.square() * y_errors2[..., None]
        + across.square() * both_errors2[..., None]
    )
    context = (gated[..., None] * sampled).sum((3, 4))
    terms = levels * points * CORNERS
    context_errors2 = summed((gated2[..., None] * sampled_errors2).sum((3, 4)), context, terms)

    grad = grad_context[:, :, :, None, None]  # (B, Q, H, 1, 1, D)
    dweights = gate * (grad * sampled).sum(-1)
    dweights_errors2 = gate.square() * (
        (grad.square() * sampled_terms2).sum(-1)
        + (grad * along_x).sum(-1).square() * x_errors2
        + (grad * along_y).sum(-1).square() * y_errors2
        + (grad * across).sum(-1).square() * both_errors2
    )
    dweights_errors2 = summed(dweights_errors2, dweights, CORNERS * case.channels)

    along = torch.stack(((grad * along_x).sum(-1), (grad * along_y).sum(-1)), -1)
    dlocations = gated[..., None] * size * along
    corner2 = (grad[..., None, :] * around).square().sum(-1)  # (B, Q, H, L, P, 4)
    c00, c10, c01, c11 = corner2.unbind(-1)
    terms_x2 = FACTORS * ((1 - y).square() * (c10 + c00) + y.square() * (c11 + c01))
    terms_y2 = FACTORS * ((1 - x).square() * (c01 + c00) + x.square() * (c11 + c10))
    across2 = (grad * across).sum(-1).square()
    along_errors2 = torch.stack((terms_x2 + across2 * y_errors2, terms_y2 + across2 * x_errors2), -1)
    dlocations_errors2 = gated2[..., None] * size.square() * along_errors2
    dlocations_errors2 = summed(dlocations_errors2, dlocations, CORNERS * case.channels)

    # A corner's weight is a product of x or 1 - x, and y or 1 - y.
    weight_errors2 = torch.stack(
        [
            (y if up else 1 - y).square() * x_errors2
            + (x if right else 1 - x).square() * y_errors2
            + both_errors2
            for right, up in _OFFSETS
        ],
        -1,
    )
    weight_errors2 = (FACTORS * bilinear.square() + weight_errors2) * inside
    dv = _scattered(gated[..., None] * bilinear, grad_context, tokens, case)
    squares = _scattered(gated2[..., None] * weight_errors2, grad_context.square(), tokens, case)
    ones = torch.ones_like(grad_context[..., :1])
    counts = _scattered((gated[..., None] * inside != 0).double(), ones, tokens, case)
    dv_errors2 = summed(squares, dv, counts)

    values = {"context": context, "dv": dv, "dlocations": dlocations, "dweights": dweights}
    errors2 = (context_errors2, dv_errors2, dlocations_errors2, dweights_errors2)
    scales = {name: squares.sqrt() for name, squares in zip(values, errors2, strict=True)}
    wanted = {"context", *(GRADIENTS[name] for name in WANTED[case.wanted])}
    return Truth(*({name: t for name, t in of.items() if name in wanted} for of in (values, scales)))


_OFFSETS = ((0, 0), (1, 0), (0, 1), (1, 1))
"""x and y of the corners, in the order of `headoff.deformable.corners`."""


def _inside(position: Tensor, size: Tensor) -> Tensor:
    cell = position.floor()
    return ((cell >= 0) & (cell < size)).all(-1)


def _scattered(weights: Tensor, grad: Tensor, tokens: Tensor, case: DeformableCase) -> Tensor:
    """(B, N, H, D): for each token the sum of weights (B, Q, H, L, P, 4) times grad (B, Q, H, D) of its corners.

    A product with the dense matrix of attention weights (B, H, Q, N).
    """
    batch, queries, heads = weights.shape[:3]
    weights, tokens = weights.flatten(3).transpose(1, 2), tokens.flatten(3).transpose(1, 2)
    grad = grad.transpose(1, 2)  # (B, H, Q, D)
    dense = torch.zeros(batch, heads, queries, case.tokens, dtype=torch.float64)
    dense.scatter_add_(-1, tokens, weights)
    return (dense.mT @ grad).transpose(1, 2)
