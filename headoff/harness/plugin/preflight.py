"""One look at a patch before hundreds of tests are: can it be imported and called, forward and backward?

In a process of its own (`headoff verify` is in one already): a native kernel may take its process down with it, and an
error of a CUDA kernel leaves a process in which nothing works any more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from headoff.attention import Attention, attention_names, resolve_attention
from headoff.devices import torch_dtype
from headoff.errors import AttentionError, HeadoffError
from headoff.harness.exceptions import describe_exception
from headoff.harness.process import emit, is_watched, limited, run_in_process
from headoff.harness.settings import Settings

SHAPES = {"encoder_self": (144, 144), "decoder_self": (100, 100), "decoder_cross": (200, 144)}
"""Queries and keys of the first calls, by site: those of the bundled model."""


def preflight_all(several: Iterable[Settings]) -> None:
    """`preflight` of the attention of these settings, which differ in their dtype. Raises AttentionError."""
    for settings in several:
        preflight(settings.attention, settings.device, settings.dtype, settings.timeout)


@functools.cache
def preflight(attention: str, device: str, dtype: str, limit: float) -> None:
    """Raise AttentionError, one sentence, where the attention cannot be tested at all.

    Args:
        limit: seconds that its import may take, and its first calls.
    """
    if attention in attention_names() or is_watched():
        try_patch(attention, device, dtype)  # headoff's own do no harm
        return
    errors: list[str] = []
    ended = run_in_process(
        f"{__name__}:answer",
        [attention, device, dtype],
        lambda event: errors.append(event["error"]),
        limit=limit,
        quiet=True,
    )
    if ended.interrupted:
        raise KeyboardInterrupt
    if errors or ended.code or ended.running:
        raise AttentionError(errors[0] if errors else f"{attention} {ended.how}")


def try_patch(spec: str, device: str, dtype: str) -> None:
    """Import an attention and call it. Raises AttentionError, one sentence."""
    with limited("its import"):
        attention = resolve_attention(spec)
    with limited("its first calls"):
        first_calls(attention, spec, torch.device(device), torch_dtype(dtype))


def answer(arguments: list[str]) -> int:
    """What the other process does."""
    try:
        try_patch(*arguments)
    except HeadoffError as error:
        emit({"error": str(error)})
        return 1
    return 0


def first_calls(attention: Attention, label: str, device: torch.device, dtype: torch.dtype) -> None:
    """Call it at each site's shape, forward and backward. Raises AttentionError, one sentence."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    for site, (queries, keys) in SHAPES.items():
        query, key, value = (random(1, 8, length, 32).requires_grad_() for length in (queries, keys, keys))
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
            try:
                context = attention(query, key, value, attn_mask, head_gate=head_gate)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except HeadoffError:
                raise
            except (Exception, SystemExit) as error:
                raise AttentionError(f"{label} raised {describe_exception(error)} when {where}") from error
            _check(context, query, label, where)
            try:
                torch.autograd.grad(context.sum(), (query, key, value), allow_unused=True)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except (Exception, SystemExit) as error:
                raise AttentionError(
                    f"{label} has no backward pass that works: it raised {describe_exception(error)} when {where}"
                ) from error


def _check(context: object, query: Tensor, label: str, where: str) -> None:
    if not isinstance(context, Tensor):
        raise AttentionError(
            f"{label} returned a {type(context).__name__} when {where}: return the context, one tensor"
        )
    if context.shape != query.shape:
        raise AttentionError(
            f"{label} returned a context of shape {tuple(context.shape)} when {where}: the query's shape, "
            f"{tuple(query.shape)}, was expected"
        )
    if not context.requires_grad:
        raise AttentionError(
            f"{label} returned a context without a gradient when {where}: relevance is made of gradients; compute the "
            "context from the inputs, or give an autograd.Function a backward pass"
        )
