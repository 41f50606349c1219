"""One look at a patch before hundreds of tests are: can it be imported and called, forward and backward?

In a process of its own (`headoff verify` is in one already): a native kernel may take its process down with it, and an
error of a CUDA kernel leaves a process in which nothing works any more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headoff.attention import AdaptedAttention, Attention
from headoff.deformable import DeformableAttention
from headoff.devices import torch_dtype
from headoff.errors import AttentionError, HeadoffError
from headoff.harness.contracts import DEFORMABLE, contract_named
from headoff.harness.exceptions import describe_exception
from headoff.harness.process import emit, is_watched, limited, run_in_process
from headoff.harness.settings import Settings
from headoff.signatures import signature_of

SHAPES = {"encoder_self": (144, 144), "decoder_self": (100, 100), "decoder_cross": (200, 144)}
"""Queries and keys of the first calls, by site: those of the bundled model."""


class FirstCall(NamedTuple):
    """An attention as it is asked for, and what it is called with; of types that JSON knows."""

    attention: str
    device: str
    dtype: str
    contract: str = "dense"
    forward_only: bool = False


def preflight_all(several: Iterable[Settings]) -> None:
    """`preflight` of the attention of these settings, which differ in their dtype. Raises AttentionError."""
    for one in several:
        asked = FirstCall(one.attention, one.device, one.dtype, one.contract, one.forward_only)
        preflight(asked, one.timeout)


@functools.cache
def preflight(asked: FirstCall, limit: float) -> None:
    """Raise AttentionError, one sentence, where the attention cannot be tested at all.

    Args:
        limit: seconds that its import may take, and its first calls.
    """
    if asked.attention in contract_named(asked.contract).registered() or is_watched():
        try_patch(asked)  # headoff's own do no harm
        return
    errors: list[str] = []
    ended = run_in_process(
        f"{__name__}:answer",
        list(asked),
        lambda event: errors.append(event["error"]),
        limit=limit,
        quiet=True,
    )
    if ended.interrupted:
        raise KeyboardInterrupt
    if errors or ended.code or ended.running:
        raise AttentionError(errors[0] if errors else f"{asked.attention} {ended.how}")


def try_patch(asked: FirstCall) -> None:
    """Import an attention and call it. Raises AttentionError, one sentence."""
    deformable = asked.contract == DEFORMABLE.name
    with limited("its import"):
        attention = contract_named(asked.contract).resolve(asked.attention)
    if not deformable and takes_locations(attention):
        raise AttentionError(f"{asked.attention} takes sampling_locations: add --contract deformable")
    try_it: Any = first_deformable_calls if deformable else first_calls
    with limited("its first calls"):
        dtype = torch_dtype(asked.dtype)
        try_it(attention, asked.attention, torch.device(asked.device), dtype, asked.forward_only)


def takes_locations(attention: Attention) -> bool:
    """Whether the user's callable says that it is a deformable attention."""
    inner = attention.call if isinstance(attention, AdaptedAttention) else attention
    signature = signature_of(inner)
    return signature is not None and "sampling_locations" in signature.parameters


def answer(arguments: list[Any]) -> int:
    """What the other process does."""
    try:
        try_patch(FirstCall(*arguments))
    except HeadoffError as error:
        emit({"error": str(error)})
        return 1
    return 0


def first_calls(
    attention: Attention, label: str, device: torch.device, dtype: torch.dtype, forward_only: bool = False
) -> None:
    """Call it at each site's shape, forward and mostly backward. Raises AttentionError, one sentence."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    for site, (queries, keys) in SHAPES.items():
        query, key, value = (
            random(1, 8, length, 32).requires_grad_(not forward_only) for length in (queries, keys, keys)
        )
        mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device)
        mask[..., -1] = False
        gate = torch.ones(8, 1, 1, device=device, dtype=dtype)
        gate[0] = 0
        for words, attn_mask, head_gate in (
            ("", None, None),
            (" with a head gate", None, gate),
            (" with a mask", mask, None),
        ):
            where = f"called as in {site} ({queries} queries, {keys} keys{words}, {str(dtype)[6:]}, {device.type})"
            attend = functools.partial(_attend, attention, attn_mask, head_gate)
            expected = ("the query's shape", query.shape)
            _try(attend, (query, key, value), expected, label, where)


def _attend(
    attention: Attention,
    attn_mask: Tensor | None,
    head_gate: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    return attention(query, key, value, attn_mask, head_gate=head_gate)


LEVELS = ((20, 20), (10, 10), (5, 5))
"""(h, w) of the levels of the first calls of a deformable attention."""


def first_deformable_calls(
    attention: DeformableAttention,
    label: str,
    device: torch.device,
    dtype: torch.dtype,
    forward_only: bool = False,
) -> None:
    """Call it as RT-DETR's decoder does, forward and mostly backward. Raises AttentionError, one sentence."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in LEVELS)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device, dtype).requires_grad_(not forward_only)

    value, locations = random(1, tokens, 8, 32), random(1, 300, 8, len(LEVELS), 4, 2)
    weights = random(1, 300, 8, len(LEVELS), 4)
    gate = torch.ones(1, 1, 8, 1, device=device, dtype=dtype)
    gate[:, :, 0] = 0
    for words, head_gate in (("", None), (" with a head gate", gate)):
        where = f"called with 300 queries and 3 levels of 4 points{words} ({str(dtype)[6:]}, {device.type})"
        attend = functools.partial(_attend_levels, attention, head_gate)
        expected = ("(batch, queries, heads, channels)", torch.Size((1, 300, 8, 32)))
        _try(attend, (value, locations, weights), expected, label, where)


def _attend_levels(
    attention: DeformableAttention, head_gate: Tensor | None, value: Tensor, *points: Tensor
) -> Tensor:
    return attention(value, LEVELS, *points, head_gate=head_gate)


def _try(
    attend: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    expected: tuple[str, torch.Size],
    label: str,
    where: str,
) -> None:
    """One call, and back if the `inputs` require gradients. `expected` is the context's shape, in words and numbers."""
    device, backward = inputs[0].device, inputs[0].requires_grad
    try:
        with torch.set_grad_enabled(backward):
            context = attend(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except HeadoffError:
        raise
    except (Exception, SystemExit) as error:
        message = f"{label} raised {describe_exception(error)} when {where}"
        if backward and _answers_without_gradients(attend, inputs):
            message += f" with inputs that require gradients, and not with others: {REMEDY}"
        raise AttentionError(message) from error
    _check(context, expected, label, where, backward)
    if not backward:
        return
    try:
        torch.autograd.grad(context.sum(), inputs, allow_unused=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (Exception, SystemExit) as error:
        raise AttentionError(
            f"{label} has no backward pass that works: it raised {describe_exception(error)} when {where}; "
            f"{REMEDY}"
        ) from error


def _answers_without_gradients(attend: Callable[..., Tensor], inputs: Sequence[Tensor]) -> bool:
    try:
        with torch.no_grad():
            attend(*(tensor.detach() for tensor in inputs))
    except (Exception, SystemExit):
        return False
    return True


REMEDY = "add --forward-only to have its forward pass tested alone"


def _check(context: object, expected: tuple[str, torch.Size], label: str, where: str, backward: bool) -> None:
    if not isinstance(context, Tensor):
        raise AttentionError(
            f"{label} returned a {type(context).__name__} when {where}: return the context, one tensor"
        )
    words, shape = expected
    if context.shape != shape:
        raise AttentionError(
            f"{label} returned a context of shape {tuple(context.shape)} when {where}: {words}, "
            f"{tuple(shape)}, was expected"
        )
    if backward and not context.requires_grad:
        raise AttentionError(
            f"{label} returned a context without a gradient when {where}: relevance is made of gradients; compute the "
            f"context from the inputs, or give an autograd.Function a backward pass, or {REMEDY}"
        )
