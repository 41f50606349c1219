"""Faults other than wrong values of one call: state between calls, modified inputs, hidden exceptions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headoff.attention import Attention
from mutants.parts import by_hand, context, dkey, plain
from mutants.registry import wrong


def tapped(change, whole: Attention | None = None) -> Attention:
    """A right attention, with what `change(query, key, value, attn_mask, head_gate)` returns in place of its inputs."""
    whole = whole or plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        query, key, value, attn_mask, head_gate = change(query, key, value, attn_mask, head_gate)
        return whole(query, key, value, attn_mask, head_gate=head_gate)

    return attention


def overwritable(x: Tensor | None) -> bool:
    """Whether each of its elements has memory of its own."""
    return x is not None and all(
        stride or size == 1 for size, stride in zip(x.shape, x.stride(), strict=True)
    )


@wrong(
    "state", "the context is written into a buffer that the next call of that size reuses", shows=("state",)
)
def state_output_buffer_reused():
    buffers: dict[tuple, Tensor] = {}

    class Buffered(torch.autograd.Function):
        @staticmethod
        def forward(ctx, context):
            key = context.shape, context.dtype
            if key not in buffers:
                buffers[key] = torch.empty_like(context)
            return buffers[key].copy_(context).detach()

        @staticmethod
        def backward(ctx, grad_output):
            return grad_output

    return plain(context=lambda s: Buffered.apply(context(s)))


@wrong("state", "results are cached by the shapes of the inputs", shows=("randomness",))
def state_cached_by_shape():
    whole, cache = plain(), {}

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        known = query.shape, key.shape, attn_mask is None, head_gate is None, query.dtype
        if known not in cache:
            cache[known] = whole(query, key, value, attn_mask, head_gate=head_gate)
        return cache[known]

    return attention


@wrong(
    "state",
    "where no gradient is asked for, results are cached by the shapes of the inputs",
    shows=("state",),
)
def state_no_grad_cached_by_shape():
    whole, cache = plain(), {}

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        result = whole(query, key, value, attn_mask, head_gate=head_gate)
        known = query.shape, key.shape, attn_mask is None, head_gate is None, query.dtype
        return result if torch.is_grad_enabled() else cache.setdefault(known, result)

    return attention


@wrong("state", "results are cached by the addresses of the inputs, whatever is there now", shows=("state",))
def state_cached_by_address():
    whole, cache = plain(), {}

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        inputs = [x for x in (query, key, value, attn_mask, head_gate) if x is not None]
        known = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in inputs)
        if known not in cache or torch.is_grad_enabled():
            cache[known] = whole(query, key, value, attn_mask, head_gate=head_gate)
        return cache[known].clone()

    return attention


@wrong("state", "the mask of the first call of that size is kept", shows=("state",), needs=("mask",))
def state_first_mask_kept():
    masks: dict[torch.Size, Tensor] = {}

    def first(query, key, value, attn_mask, head_gate):
        if attn_mask is not None:
            attn_mask = masks.setdefault((query.shape, key.shape), attn_mask.clone())
        return query, key, value, attn_mask, head_gate

    return tapped(first)


@wrong("state", "a mask once seen stays in force for calls without one", shows=("state",), needs=("mask",))
def state_mask_stays():
    masks: dict[tuple, Tensor] = {}

    def last(query, key, value, attn_mask, head_gate):
        if attn_mask is not None:
            masks[query.shape, key.shape] = attn_mask.clone()
        return query, key, value, masks.get((query.shape, key.shape)), head_gate

    return tapped(last)


@wrong("state", "the gate of the first call of that size is kept", shows=("state",), needs=("gate",))
def state_first_gate_kept():
    gates: dict[tuple, Tensor] = {}

    def first(query, key, value, attn_mask, head_gate):
        if head_gate is not None:
            head_gate = gates.setdefault(query.shape, head_gate.clone())
        return query, key, value, attn_mask, head_gate

    return tapped(first)


@wrong(
    "state",
    "which heads are on is decided in the first call and kept",
    shows=("state",),
    needs=("gate zero",),
)
def state_first_skipping_kept():
    plans: dict[tuple, Tensor] = {}

    def planned(s) -> Tensor:
        on = plans.setdefault(tuple(s.query.shape), s.gate != 0)
        return s.gate * on

    return plain(gate=planned)


@wrong(
    "state",
    "key and value of the first call of that size are kept, as in a cache for decoding",
    shows=("state",),
)
def state_first_keys_kept():
    memory: dict[tuple, tuple[Tensor, Tensor]] = {}

    def first(query, key, value, attn_mask, head_gate):
        seen = memory.setdefault((key.shape, key.dtype), (key.detach().clone(), value.detach().clone()))
        # The numbers of the first call, the gradients of this one.
        key, value = (x + (kept - x.detach()) for x, kept in zip((key, value), seen, strict=True))
        return query, key, value, attn_mask, head_gate

    return tapped(first)


@wrong("state", "every seventh call loses its gate", shows=("randomness",), needs=("gate",))
def state_every_seventh_call():
    count = 0

    def seventh(query, key, value, attn_mask, head_gate):
        nonlocal count
        count += 1
        return query, key, value, attn_mask, None if count % 7 == 0 else head_gate

    return tapped(seventh)


@wrong(
    "state",
    "while it is being tuned, the first call adds its context up twice",
    shows=("context", "randomness"),
)
def state_first_call_tunes():
    tuned = False

    def tuning(s) -> Tensor:
        nonlocal tuned
        times, tuned = 1 if tuned else 2, True
        return context(s) * times

    return plain(context=tuning)


@wrong(
    "state",
    "keys are clamped to the largest number of earlier calls, as in delayed 8-bit scaling",
    shows=("state",),
)
def state_delayed_scaling():
    largest: list[float] = []

    def clamped(query, key, value, attn_mask, head_gate):
        now = float(key.detach().abs().max())
        limit = max(largest, default=now)
        largest.append(now)
        return query, key + (key.clamp(-limit, limit) - key).detach(), value, attn_mask, head_gate

    return tapped(clamped)


@wrong(
    "state",
    "keys lie in a workspace that only grows, and a smaller call sees those of a larger one",
    shows=("state",),
)
def state_workspace_never_shrinks():
    kept: dict[tuple, tuple[Tensor, Tensor]] = {}

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        batch, heads, keys, channels = key.shape
        known = batch, heads, channels, key.dtype
        stale = kept.get(known)
        extra = 0 if stale is None else max(0, stale[0].shape[2] - keys)
        if stale is None or not extra:
            kept[known] = key.detach().clone(), value.detach().clone()
        else:
            key, value = (
                torch.cat([x, old[:, :, keys:]], 2) for x, old in zip((key, value), stale, strict=True)
            )
            if attn_mask is not None:
                seen = True if attn_mask.dtype == torch.bool else 0
                shape = (*attn_mask.shape[:-1], extra)
                attn_mask = torch.cat([attn_mask, attn_mask.new_full(shape, seen)], -1)
        return plain()(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong("state", "the buffer of dk is not cleared, and gradients add up over calls", shows=("randomness",))
def state_gradient_buffer_not_cleared():
    buffers: dict[tuple, Tensor] = {}

    def added(s) -> Tensor:
        known = tuple(s.key.shape), s.asked
        buffers[known] = buffers.get(known, 0) + dkey(s)
        return buffers[known]

    return by_hand(dkey=added)


@wrong(
    "state", "the backward pass uses the gate of the latest forward pass", shows=("state",), needs=("gate",)
)
def state_backward_reads_latest_gate():
    latest: dict[tuple, Tensor] = {}
    whole = by_hand(gate=lambda s: latest[tuple(s.query.shape)].to(s.query).expand_as(s.gate))

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if head_gate is not None:
            latest[tuple(query.shape)] = head_gate.clone()
        return whole(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong("state", "where no gradient is asked for, the gate is ignored", shows=("grad mode",), needs=("gate",))
def state_no_grad_loses_gate():
    return plain(gate=lambda s: s.gate if torch.is_grad_enabled() else torch.ones_like(s.gate))


@wrong("state", "where no gradient is asked for, the mask is ignored", shows=("grad mode",), needs=("mask",))
def state_no_grad_loses_mask():
    fast, whole = plain(masked=lambda s: s.scores), plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        training = torch.is_grad_enabled()
        return (whole if training else fast)(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong(
    "state",
    "where no input requires a gradient, it is computed in bfloat16",
    shows=("grad mode",),
    needs=("not bfloat16",),
)
def state_no_grad_in_bfloat16():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            return whole(query, key, value, attn_mask, head_gate=head_gate)
        inside = (x.bfloat16() for x in (query, key, value))
        return whole(*inside, attn_mask, head_gate=head_gate).to(query.dtype)

    return attention


@wrong("in-place", "the query is scaled where it lies", shows=("in-place",), needs=("dense query",))
def inplace_query_scaled():
    whole = plain()

    def scaled(query, key, value, attn_mask, head_gate):
        mine = query.clone()
        if overwritable(query):
            query.data.mul_(1 / math.sqrt(query.shape[-1]))
        return mine, key, value, attn_mask, head_gate

    return tapped(scaled, whole)


@wrong(
    "in-place",
    "fully masked rows are opened in the caller's mask",
    shows=("in-place",),
    needs=("fully masked row",),
)
def inplace_mask_opened():
    whole = plain()

    def opened(query, key, value, attn_mask, head_gate):
        mine = attn_mask
        if overwritable(attn_mask):
            mine = attn_mask.clone()
            if attn_mask.dtype == torch.bool:
                attn_mask |= ~attn_mask.any(-1, keepdim=True)
            else:
                attn_mask.masked_fill_((attn_mask == -math.inf).all(-1, keepdim=True), 0.0)
        return query, key, value, mine, head_gate

    return tapped(opened, whole)


@wrong(
    "in-place",
    "an additive mask is multiplied by log2(e) where it lies",
    shows=("in-place",),
    needs=("bias",),
)
def inplace_mask_scaled():
    def multiplied(query, key, value, attn_mask, head_gate):
        mine = attn_mask
        if overwritable(attn_mask) and attn_mask.is_floating_point():
            mine = attn_mask.clone()
            attn_mask.mul_(math.log2(math.e))
        return query, key, value, mine, head_gate

    return tapped(multiplied)


@wrong(
    "in-place",
    "values of heads that are off are zeroed where they lie",
    shows=("in-place",),
    needs=("head off",),
)
def inplace_values_zeroed():
    def zeroed(query, key, value, attn_mask, head_gate):
        mine = value.clone()
        if head_gate is not None and overwritable(value):
            gate = head_gate.expand(*query.shape[:3], 1)
            value.data.masked_fill_((gate == 0).all(2, keepdim=True), 0)
        return query, key, mine, attn_mask, head_gate

    return tapped(zeroed)


@wrong("in-place", "the scale is multiplied into the gate", shows=("in-place",), needs=("gate",))
def inplace_gate_scaled():
    def folded(query, key, value, attn_mask, head_gate):
        mine = head_gate
        if overwritable(head_gate) and head_gate.is_floating_point():
            mine = head_gate.clone()
            head_gate.mul_(1 / math.sqrt(query.shape[-1]))
        return query, key, value, attn_mask, mine

    return tapped(folded)


@wrong("in-place", "the key is centred where it lies and restored, with rounding", shows=("in-place",))
def inplace_key_restored():
    def restored(query, key, value, attn_mask, head_gate):
        mine = key.clone()
        if overwritable(key):
            mean = key.data.mean(2, keepdim=True) * 1.7
            key.data.sub_(mean).add_(mean)
        return query, mine, value, attn_mask, head_gate

    return tapped(restored)


@wrong(
    "in-place",
    "the backward pass gates the gradient of the context where it lies",
    shows=("in-place",),
    needs=("gate",),
)
def inplace_gradient_gated():
    def written(s) -> Tensor:
        result = s.gradient * s.gate
        if overwritable(s.grad_output):
            s.grad_output.copy_(result)
        return result

    return by_hand(gated_gradient=written)


def leaving(change) -> Attention:
    """A right attention that calls `change` on its way."""
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        change()
        return whole(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong("settings", "the precision of float32 products is set to 'high' for good", shows=("settings",))
def settings_matmul_precision():
    return leaving(lambda: torch.set_float32_matmul_precision("high"))


@wrong("settings", "the default dtype is set to float64 for good", shows=("settings",))
def settings_default_dtype():
    return leaving(lambda: torch.set_default_dtype(torch.float64))


@wrong("settings", "torch is seeded", shows=("settings",))
def settings_seeded():
    return leaving(lambda: torch.manual_seed(0))


@wrong("settings", "random numbers are drawn, and used for nothing", shows=("settings",))
def settings_random_state_advanced():
    return leaving(lambda: torch.rand(1))


@wrong("settings", "gradients are switched off after the call", shows=("settings",))
def settings_grad_switched_off():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        context = whole(query, key, value, attn_mask, head_gate=head_gate)
        torch.set_grad_enabled(False)
        return context

    return attention


@wrong("settings", "the number of threads is changed for good", shows=("settings",))
def settings_threads():
    return leaving(lambda: torch.set_num_threads(2 if torch.get_num_threads() == 1 else 1))


@wrong("settings", "torch's flash attention is switched off for good", shows=("settings",))
def settings_backend_switched_off():
    return leaving(lambda: torch.backends.cuda.enable_flash_sdp(False))


@wrong("settings", "the tuning of convolutions is switched on for good", shows=("settings",))
def settings_tuning():
    def switch() -> None:
        torch.backends.cudnn.benchmark = True

    return leaving(switch)


class KernelError(RuntimeError):
    """What a kernel raises that is not built for a call."""


def fallback(query, key, value, attn_mask=None, *, head_gate=None) -> Tensor:
    """The right context, by torch."""
    if attn_mask is not None:
        open_rows = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf
        fully_masked = ~open_rows.any(-1, keepdim=True)
        attn_mask = (
            attn_mask | fully_masked
            if attn_mask.dtype == torch.bool
            else attn_mask.masked_fill(fully_masked, 0.0)
        )
        attn_mask = attn_mask.to(query) if attn_mask.is_floating_point() else attn_mask
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        result = scaled_dot_product_attention(query, key, value, attn_mask).masked_fill(fully_masked, 0)
    else:
        result = scaled_dot_product_attention(query, key, value)
    return result if head_gate is None else result * head_gate.to(result)


def built_for(possible) -> Attention:
    """A right kernel that raises where `possible(query, key, value, attn_mask, head_gate)` is false."""

    def check(query, key, value, attn_mask, head_gate):
        if not possible(query, key, value, attn_mask, head_gate):
            raise KernelError("this kernel is not built for that")
        return query, key, value, attn_mask, head_gate

    return tapped(check)


@wrong(
    "calls",
    "the kernel never runs: every call ends in an exception that is caught, and torch answers",
    shows=("calls",),
)
def calls_always_fall_back():
    kernel = built_for(lambda *inputs: False)

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        try:
            return kernel(query, key, value, attn_mask, head_gate=head_gate)
        except Exception:
            return fallback(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong(
    "calls", "with a gate the kernel fails, silently, and torch answers", shows=("calls",), needs=("gate",)
)
def calls_fall_back_with_gate():
    kernel = built_for(lambda query, key, value, attn_mask, head_gate: head_gate is None)

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        try:
            return kernel(query, key, value, attn_mask, head_gate=head_gate)
        except KernelError:
            return fallback(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong(
    "calls",
    "with a mask the kernel fails, silently, and torch answers without the gate",
    shows=("context", "calls"),
    needs=("mask",),
)
def calls_fall_back_without_gate():
    kernel = built_for(lambda query, key, value, attn_mask, head_gate: attn_mask is None)

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        try:
            return kernel(query, key, value, attn_mask, head_gate=head_gate)
        except KernelError:
            return fallback(query, key, value, attn_mask)

    return attention


@wrong(
    "calls",
    "where the kernel fails, the query is returned",
    shows=("context", "calls"),
    needs=("D no power of 2",),
)
def calls_fall_back_to_query():
    kernel = built_for(lambda query, *others: query.shape[-1] & (query.shape[-1] - 1) == 0)

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        try:
            return kernel(query, key, value, attn_mask, head_gate=head_gate)
        except KernelError:
            return query.clone()

    return attention


@wrong("calls", "where the kernel fails, zeros are returned", shows=("context", "calls"), needs=("D > 128",))
def calls_fall_back_to_zeros():
    kernel = built_for(lambda query, *others: query.shape[-1] <= 128)

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        try:
            return kernel(query, key, value, attn_mask, head_gate=head_gate)
        except KernelError:
            return query * 0 + (key.sum() + value.sum()) * 0

    return attention


@wrong(
    "calls",
    "half precision is refused inside, and the query returned",
    shows=("context", "calls"),
    needs=("half precision",),
)
def calls_half_precision_gives_query():
    kernel = built_for(lambda query, *others: query.dtype in (torch.float32, torch.float64))

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        try:
            return kernel(query, key, value, attn_mask, head_gate=head_gate)
        except KernelError:
            return query.clone()

    return attention
