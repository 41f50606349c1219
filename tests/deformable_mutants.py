"""Deformable attentions to test the harness with: `WRONG`, with one realistic fault each, and `RIGHT` ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from headoff.deformable import conform, gather_attention, grid_sample_attention, level_tensors

Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class Wrong:
    """A mutant.

    Attributes:
        property, said: of the finding that must come of it, and words that its message must have.
        make: returns a new callable.
    """

    property: str
    said: str
    make: Callable[[], Kernel]


WRONG: dict[str, Wrong] = {}
RIGHT: dict[str, Callable[[], Kernel]] = {}


def wrong(property: str, said: str) -> Callable[[Callable[[], Kernel]], Callable[[], Kernel]]:
    def register(make: Callable[[], Kernel]) -> Callable[[], Kernel]:
        WRONG[make.__name__] = Wrong(property, said, make)
        return make

    return register


def right(make: Callable[[], Kernel]) -> Callable[[], Kernel]:
    RIGHT[make.__name__] = make
    return make


def sampler(*, align_corners=False, padding_mode="zeros", mode="bilinear", shift=0.0):
    """`grid_sample_attention`, by other settings of `grid_sample`; `shift` is in cells."""

    def attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        batch, queries, heads = sampling_locations.shape[:3]
        context, first = 0.0, 0
        for level, (height, width) in enumerate(spatial_shapes):
            tokens = value[:, first : first + height * width]
            first += height * width
            image = tokens.permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
            size = torch.tensor((width, height), dtype=value.dtype, device=value.device)
            grid = (2 * (sampling_locations[:, :, :, level] + shift / size) - 1).transpose(1, 2).flatten(0, 1)
            read = grid_sample(image, grid, mode=mode, padding_mode=padding_mode, align_corners=align_corners)
            weights = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
            context = context + (read * weights).sum(-1)
        context = context.view(batch, heads, value.shape[-1], queries).permute(0, 3, 1, 2).contiguous()
        return context if head_gate is None else context * head_gate

    return attention


def changed(**changes: Callable[..., Any]) -> Kernel:
    """`gather_attention` of changed arguments: `value`, `shapes`, `locations`, `weights`, `gate`, or `context`."""

    def attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        arguments = {
            "value": value,
            "shapes": spatial_shapes,
            "locations": sampling_locations,
            "weights": attention_weights,
            "gate": head_gate,
        }
        for name, change in changes.items():
            if name in arguments and arguments[name] is not None:
                arguments[name] = change(arguments[name])
        return gather_attention(*list(arguments.values())[:4], head_gate=arguments["gate"])

    return attention


class _Backward(torch.autograd.Function):
    """The right context, and gradients that `change(gradients, inputs)` has changed."""

    @staticmethod
    def forward(ctx, value, locations, weights, gate, shapes, change):
        ctx.save_for_backward(value, locations, weights, gate)
        ctx.shapes, ctx.change = shapes, change
        return gather_attention(value, shapes, locations, weights, head_gate=gate)

    @staticmethod
    def backward(ctx, grad):
        value, locations, weights, gate = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
            context = gather_attention(inputs[0], ctx.shapes, *inputs[1:], head_gate=gate)
        found = torch.autograd.grad(context, inputs, grad)
        gradients = dict(zip(("dv", "dlocations", "dweights"), found, strict=True))
        gradients |= ctx.change(gradients, ctx.shapes)
        return *gradients.values(), None, None, None


def backward(change: Callable[..., dict[str, Tensor | None]]) -> Kernel:
    def attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        return _Backward.apply(
            value, sampling_locations, attention_weights, head_gate, spatial_shapes, change
        )

    return attention


# Wrong: where values are read


@wrong("sampling", "x and y of the sampling locations are swapped")
def x_and_y_swapped():
    return changed(locations=lambda locations: locations.flip(-1))


@wrong("sampling", "align_corners=True")
def corners_aligned():
    return sampler(align_corners=True)


@wrong("sampling", "half a cell too far")
def half_a_cell_off():
    return sampler(shift=0.5)


@wrong("sampling", "outside of a level its border is read, not zeros")
def border_not_zeros():
    return sampler(padding_mode="border")


@wrong("sampling", "the nearest cell is read, without interpolation")
def nearest():
    def attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        size = level_tensors(spatial_shapes, value.device)[0].flip(1)[:, None]
        rounded = ((sampling_locations * size - 0.5).round() + 0.5) / size
        return gather_attention(value, spatial_shapes, rounded, attention_weights, head_gate=head_gate)

    return attention


# Wrong: levels


@wrong("levels", "each level but the first starts one token too late")
def levels_start_one_late():
    def attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        first = level_tensors(spatial_shapes, value.device)[1].tolist()
        levels = zip(first, spatial_shapes, strict=True)
        late = [torch.arange(start, start + h * w) + (start > 0) for start, (h, w) in levels]
        value = value[:, torch.cat(late).clamp(max=value.shape[1] - 1)]
        return gather_attention(
            value, spatial_shapes, sampling_locations, attention_weights, head_gate=head_gate
        )

    return attention


@wrong("levels", "the last level is left out")
def last_level_left_out():
    def attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        kept = torch.arange(len(spatial_shapes), device=value.device) < len(spatial_shapes) - 1
        weights = attention_weights * kept[:, None]
        return gather_attention(value, spatial_shapes, sampling_locations, weights, head_gate=head_gate)

    return attention


# Wrong: attention weights


@wrong("weights", "the attention weights are ignored")
def weights_not_applied():
    return changed(weights=lambda weights: weights * 0 + 1)


@wrong("weights", "the softmax is applied again")
def softmax_again():
    return changed(weights=lambda weights: weights.flatten(-2).softmax(-1).view(weights.shape))


# Wrong: the gate


@wrong("gate", "it is read as if heads came before queries")
def gate_on_the_wrong_axis():
    def attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        batch, queries, heads = sampling_locations.shape[:3]
        if head_gate is not None:
            head_gate = head_gate.expand(batch, queries, heads, 1).reshape(batch, heads, queries, 1)
            head_gate = head_gate.transpose(1, 2)
        return gather_attention(
            value, spatial_shapes, sampling_locations, attention_weights, head_gate=head_gate
        )

    return attention


@wrong("gate", "the weights are renormalised after it")
def gate_renormalised():
    def attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        if head_gate is not None:
            gated = attention_weights * head_gate[..., None]
            total = gated.sum((-2, -1), keepdim=True)
            attention_weights = torch.where(total == 0, 0.0, gated / total)
        return gather_attention(value, spatial_shapes, sampling_locations, attention_weights)

    return attention


@wrong("gate", "all that is not 0 counts as 1")
def gate_as_a_mask():
    return changed(gate=lambda gate: (gate != 0).to(gate))


# Wrong: gradients


@wrong("dlocations", "dlocations is zero")
def no_gradient_of_locations():
    return changed(locations=Tensor.detach)


@wrong("dlocations", "with width and height swapped")
def gradient_of_locations_with_sizes_swapped():
    def change(gradients, shapes):
        size = level_tensors(shapes, gradients["dlocations"].device)[0].flip(1)[:, None]
        return {"dlocations": gradients["dlocations"] / size * size.flip(-1)}

    return backward(change)


@wrong("dweights", "each level gets the dweights of the next")
def gradient_of_weights_of_the_next_level():
    return backward(lambda gradients, shapes: {"dweights": gradients["dweights"].roll(-1, 3)})


@wrong("dv", "dv lacks the gate")
def gradient_of_value_without_the_gate():
    def attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        inputs = (spatial_shapes, sampling_locations, attention_weights)
        ungated = gather_attention(value, *inputs)
        right = gather_attention(value.detach(), *inputs, head_gate=head_gate)
        of_value = gather_attention(
            value, spatial_shapes, sampling_locations.detach(), attention_weights.detach()
        )
        return (
            right if head_gate is None and not ungated.requires_grad else right + of_value - of_value.detach()
        )

    return attention


# Wrong: side effects


@wrong("randomness", "differs")
def nondeterministic():
    calls = iter(range(10**9))

    def attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        inputs = (spatial_shapes, sampling_locations, attention_weights)
        context = gather_attention(value, *inputs, head_gate=head_gate)
        return context * (1 + next(calls) % 2 * torch.finfo(value.dtype).eps)

    return attention


@wrong("in-place", "writes into the attention_weights")
def gates_in_place():
    def attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        if head_gate is not None:
            with torch.no_grad():
                attention_weights.mul_(head_gate[..., None])
        return gather_attention(value, spatial_shapes, sampling_locations, attention_weights)

    return attention


@wrong("state", "")
def levels_of_the_first_call():
    """The tensors of the levels are made once, for a number of tokens."""
    known: dict[int, Any] = {}

    def attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        shapes = known.setdefault(value.shape[1], spatial_shapes)
        if len(shapes) != len(spatial_shapes):
            shapes = spatial_shapes
        return gather_attention(value, shapes, sampling_locations, attention_weights, head_gate=head_gate)

    return attention


# Right


@right
def grid_sample_form():
    return grid_sample_attention


@right
def level_by_level_gated_afterwards():
    return sampler()


@right
def transformers_own():
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    core = MultiScaleDeformableAttention()

    def attention(value, spatial_shapes, sampling_locations, attention_weights):
        shapes, first = level_tensors(spatial_shapes, value.device)
        context = core(value, shapes, list(spatial_shapes), first, sampling_locations, attention_weights, 64)
        return context.unflatten(-1, value.shape[2:])

    return conform(attention, "transformers")


@right
def accumulated_in_float32():
    def attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        wide = torch.promote_types(value.dtype, torch.float32)
        inputs = (value.to(wide), spatial_shapes, sampling_locations.to(wide), attention_weights.to(wide))
        context = grid_sample_attention(*inputs)
        if head_gate is not None:
            context = context * head_gate.to(wide)
        return context.to(value.dtype)

    return attention


@right
def by_an_autograd_function():
    return backward(lambda gradients, shapes: {})


@right
def by_hand():
    return ByHand.attention


class ByHand(torch.autograd.Function):
    """One level and one of its four cells after the other, and the same way back, as CUDA kernels have it."""

    @classmethod
    def attention(cls, value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        compute = torch.promote_types(value.dtype, torch.float32)
        batch, queries, heads = sampling_locations.shape[:3]
        gate = value.new_ones(()) if head_gate is None else head_gate.detach()
        gate = gate.to(compute).expand(batch, queries, heads, 1)
        inputs = (value.to(compute), sampling_locations.to(compute), attention_weights.to(compute))
        return cls.apply(*inputs, gate, spatial_shapes).to(value.dtype)

    @staticmethod
    def cells(locations: Tensor, height: int, width: int):
        """For each of the four cells around points (B, Q, H, P, 2): token, weights along x and y, their slopes."""
        x = locations[..., 0] * width - 0.5
        y = locations[..., 1] * height - 0.5
        left, top = x.floor(), y.floor()
        for below in (0, 1):
            for beside in (0, 1):
                column, row = left + beside, top + below
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                along_x = x - left if beside else left + 1 - x
                along_y = y - top if below else top + 1 - y
                token = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
                yield token.long(), along_x * inside, along_y * inside, 2 * beside - 1, 2 * below - 1

    @staticmethod
    def read(tokens: Tensor, token: Tensor) -> Tensor:
        """`tokens` (B, n, H, D) at `token` (B, Q, H, P): (B, Q, H, P, D)."""
        batch = torch.arange(token.shape[0], device=token.device)[:, None, None, None]
        head = torch.arange(token.shape[2], device=token.device)[:, None]
        return tokens[batch, token, head]

    @staticmethod
    def forward(ctx, value, locations, weights, gate, shapes):
        ctx.save_for_backward(value, locations, weights, gate)
        ctx.shapes = shapes
        batch, queries, heads = locations.shape[:3]
        context = value.new_zeros(batch, queries, heads, value.shape[3])
        first = 0
        for level, (height, width) in enumerate(shapes):
            tokens = value[:, first : first + height * width]
            first += height * width
            for token, along_x, along_y, _, _ in ByHand.cells(locations[:, :, :, level], height, width):
                factor = along_x * along_y * weights[:, :, :, level]
                context += (factor[..., None] * ByHand.read(tokens, token)).sum(3)
        return context * gate

    @staticmethod
    def backward(ctx, grad):
        value, locations, weights, gate = ctx.saved_tensors
        gradient = grad * gate
        dvalue, dlocations, dweights = (torch.zeros_like(x) for x in (value, locations, weights))
        first = 0
        for level, (height, width) in enumerate(ctx.shapes):
            tokens = value[:, first : first + height * width]
            dtokens = dvalue[:, first : first + height * width]
            first += height * width
            given = weights[:, :, :, level]
            for token, along_x, along_y, slope_x, slope_y in ByHand.cells(
                locations[:, :, :, level], height, width
            ):
                dots = (ByHand.read(tokens, token) * gradient[:, :, :, None]).sum(-1)
                dweights[:, :, :, level] += along_x * along_y * dots
                inside = (along_x != 0) | (along_y != 0)
                dx, dy = along_y * slope_x * width, along_x * slope_y * height
                dlocations[:, :, :, level, :, 0] += given * dots * dx * inside
                dlocations[:, :, :, level, :, 1] += given * dots * dy * inside
                factor = (along_x * along_y * given)[..., None] * gradient[:, :, :, None]
                index = token[..., None].expand(factor.shape).transpose(1, 2).flatten(2, 3)
                by_head = torch.zeros_like(dtokens.transpose(1, 2))
                by_head.scatter_add_(2, index, factor.transpose(1, 2).flatten(2, 3))
                dtokens += by_head.transpose(1, 2)
        return dvalue, dlocations, dweights, None, None
