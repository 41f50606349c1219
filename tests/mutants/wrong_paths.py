"""Faults in code that ordinary calls do not run: without gradients, in other dtypes, after certain first calls."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headoff.attention import Attention, eager
from mutants.parts import blocks, by_hand, context, plain
from mutants.registry import wrong
from mutants.wrong_state import leaving, overwritable, tapped


def for_inference(fast: Attention) -> Attention:
    """A right attention with another kernel, `fast`, where no gradient is asked for."""
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        training = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        return (whole if training else fast)(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong(
    "sizes",
    "the kernel for inference leaves out the keys of the last, incomplete block",
    shows=("grad mode",),
    needs=("S > 16", "S ragged"),
)
def path_inference_drops_tail():
    def without_tail(query, key, value, attn_mask, head_gate):
        kept = key.shape[2] // 16 * 16 or key.shape[2]
        if attn_mask is not None and attn_mask.shape[-1] > 1:
            attn_mask = attn_mask[..., :kept]
        return query, key[:, :, :kept], value[:, :, :kept], attn_mask, head_gate

    return for_inference(tapped(without_tail))


@wrong(
    "gate",
    "the kernel for a single query without gradients takes the gate of the first head for all",
    shows=("grad mode",),
    needs=("Q = 1", "gate by head"),
)
def path_inference_one_query():
    def first(s) -> Tensor:
        return s.gate[:, :1].expand_as(s.gate) if s.gate.shape[2] == 1 else s.gate

    return for_inference(plain(gate=first))


@wrong(
    "gate",
    "the kernel for inference in half precision knows nothing of gates",
    shows=("grad mode",),
    needs=("half precision", "gate"),
)
def path_inference_half_ungated():
    half = (torch.float16, torch.bfloat16)
    return for_inference(plain(gate=lambda s: torch.ones_like(s.gate) if s.asked in half else s.gate))


@wrong(
    "mask",
    "the kernel for inference reads the bias of the first item for all, where there are many queries",
    shows=("grad mode",),
    needs=("bias", "mask by item"),
)
def path_inference_bias_of_first_item():
    def first(s) -> Tensor:
        return s.mask if s.mask.dtype == torch.bool else s.mask[:1].expand_as(s.mask)

    return for_inference(plain(mask=first))


@wrong(
    "state",
    "without mask, gate and gradients, results lie in a workspace of their shape",
    shows=("state",),
    needs=("no mask", "no gate"),
)
def path_workspace_without_mask():
    whole, kept = plain(), {}

    def fast(query, key, value, attn_mask=None, *, head_gate=None):
        result = whole(query, key, value, attn_mask, head_gate=head_gate)
        if attn_mask is not None or head_gate is not None:
            return result
        return kept.setdefault((result.shape, result.dtype), torch.empty_like(result)).copy_(result)

    return for_inference(fast)


@wrong(
    "in-place",
    "in half precision the key is scaled where it lies, lest the products overflow",
    shows=("in-place",),
    needs=("half precision",),
)
def path_half_key_scaled():
    def scaled(query, key, value, attn_mask, head_gate):
        mine = key.clone()
        if overwritable(key) and key.dtype in (torch.float16, torch.bfloat16):
            key.data.mul_(0.5)
        return query, mine, value, attn_mask, head_gate

    return tapped(scaled)


@wrong(
    "randomness",
    "bfloat16 results are rounded up or down by chance",
    shows=("randomness",),
    needs=("bfloat16",),
)
def path_bfloat16_rounded_by_chance():
    generator = torch.Generator().manual_seed(0)

    def dithered(s) -> Tensor:
        result = context(s)
        if s.asked != torch.bfloat16:
            return result
        noise = torch.rand(result.shape, generator=generator) - 0.5
        return result * (1 + noise * torch.finfo(torch.bfloat16).eps / 2)

    return plain(context=dithered)


@wrong(
    "randomness",
    "many keys are dealt out, and their parts added up in the order in which they come",
    shows=("randomness",),
    needs=("S > 512",),
)
def path_parts_in_any_order():
    # Of its own, so that nothing else is disturbed.
    chance = random.Random(0)

    def added(s) -> Tensor:
        keys = s.value.shape[2]
        if keys <= 512:
            return context(s)
        parts = blocks(keys, 32)
        chance.shuffle(parts)
        return sum(s.gated[..., part] @ s.value[:, :, part] for part in parts)

    return plain(context=added)


@wrong(
    "state",
    "a tensor that is kept for good is made in inference mode, if the first call of its size is",
    shows=("state",),
)
def state_born_in_inference_mode():
    scales: dict[tuple, Tensor] = {}

    def scaled(query, key, value, attn_mask, head_gate):
        channels = query.shape[-1]
        if (channels, query.dtype) not in scales:
            scales[channels, query.dtype] = query.new_ones(channels)
        return query * scales[channels, query.dtype], key, value, attn_mask, head_gate

    return tapped(scaled)


@wrong(
    "state",
    "the factor of the scores is kept by the number of channels, in the dtype of the first call",
    shows=("state",),
    needs=("D no power of 4", "not bfloat16"),
)
def state_scale_of_first_dtype():
    scales: dict[int, float] = {}

    def scale(s) -> float:
        channels = s.query.shape[-1]
        return scales.setdefault(channels, float(torch.tensor(channels**-0.5, dtype=s.asked)))

    return plain(scale=scale)


@wrong(
    "state",
    "the places of a mask's keys are kept by its shape and the number of keys in each item",
    shows=("state",),
    needs=("bool mask",),
)
def state_mask_known_by_lengths():
    masks: dict[tuple, Tensor] = {}

    def kept(s) -> Tensor:
        if s.mask.dtype != torch.bool:
            return s.mask
        known = tuple(s.mask.shape), tuple(s.mask.sum(-1).sum((1, 2)).tolist())
        return masks.setdefault(known, s.mask.clone())

    return plain(mask=kept)


@wrong(
    "state",
    "whether masks of a shape mask anything is asked once, for it takes time",
    shows=("state",),
    needs=("bool mask",),
)
def state_no_padding_asked_once():
    padded: dict[tuple, bool] = {}

    def asked(query, key, value, attn_mask, head_gate):
        if (
            attn_mask is not None
            and attn_mask.dtype == torch.bool
            and not padded.setdefault(tuple(attn_mask.shape), not bool(attn_mask.all()))
        ):
            attn_mask = None
        return query, key, value, attn_mask, head_gate

    return tapped(asked)


@wrong(
    "state",
    "the backward pass reads the bias from a buffer that the next call of that shape writes",
    shows=("state",),
    needs=("bias",),
)
def state_backward_reads_latest_bias():
    latest: dict[torch.Size, Tensor] = {}
    whole = by_hand(mask=lambda s: s.mask if s.mask.dtype == torch.bool else latest[s.mask.shape])

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            full = attn_mask.to(torch.promote_types(query.dtype, torch.float32))
            full = full.expand(*query.shape[:3], key.shape[2])
            latest[full.shape] = full.clone()
        return whole(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong("state", "every result is kept, to be looked at some day", shows=("memory",))
def state_results_kept():
    whole, kept = plain(), []

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        kept.append(whole(query, key, value, attn_mask, head_gate=head_gate))
        return kept[-1]

    return attention


@wrong(
    "sizes",
    "rows are dealt out to torch's threads, and those that are left over are nobody's",
    shows=("threads",),
    needs=("Q > 1",),
)
def path_rows_dealt_to_threads():
    def dealt(s) -> Tensor:
        result, threads, rows = context(s), torch.get_num_threads(), s.query.shape[2]
        done = rows // threads * threads or rows
        return result * (torch.arange(rows, device=result.device) < done)[:, None]

    return plain(context=dealt)


@wrong("settings", "denormal numbers are flushed to zero for good", shows=("settings",))
def settings_denormals_flushed():
    return leaving(lambda: torch.set_flush_denormal(True))


@wrong("settings", "oneDNN is switched off for good", shows=("settings",))
def settings_onednn_switched_off():
    def switch() -> None:
        torch.backends.mkldnn.enabled = False

    return leaving(switch)


@wrong("settings", "Python's random numbers are seeded", shows=("settings",))
def settings_python_seeded():
    return leaving(lambda: random.seed(0))


@wrong(
    "calls",
    "calls with a mask are passed on to torch, as if they were the kernel's own",
    shows=("calls",),
    needs=("mask",),
)
def calls_masked_by_torch():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if attn_mask is None:
            return whole(query, key, value, head_gate=head_gate)
        open_rows = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf
        fully_masked = ~open_rows.any(-1, keepdim=True)
        mask = (
            attn_mask | fully_masked
            if attn_mask.dtype == torch.bool
            else attn_mask.masked_fill(fully_masked, 0.0).to(query)
        )
        result = scaled_dot_product_attention(query, key, value, mask[(None,) * (4 - mask.dim())])
        result = result.masked_fill(fully_masked, 0)
        return result if head_gate is None else result * head_gate.to(result)

    return attention


@wrong(
    "gate",
    "the gradient of the gate is made of the context that is gated already",
    shows=("gate gradient",),
    needs=("gate", "fraction"),
)
def gate_gradient_of_gated_context():
    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, result, gate):
            gated = result * gate.to(result)
            ctx.save_for_backward(gated, gate)
            return gated

        @staticmethod
        def backward(ctx, gradient):
            gated, gate = ctx.saved_tensors
            of_gate = (gradient * gated).sum(-1, keepdim=True)
            shape = [1] * (4 - gate.dim()) + list(gate.shape)
            return gradient * gate.to(gradient), of_gate.sum_to_size(shape).view(gate.shape).to(gate.dtype)

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        result = eager(query, key, value, attn_mask)
        return result if head_gate is None else Gated.apply(result, head_gate)

    return attention
