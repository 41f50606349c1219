"""One look at a patch before hundreds of tests are: can it be imported and called, forward and backward?

In a process of its own, because a native kernel may take its process down with it, and because an error of a CUDA
kernel leaves a process in which nothing works any more.
"""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys

import torch
from torch import Tensor

from headoff.attention import Attention, attention_names, resolve_attention
from headoff.devices import torch_dtype
from headoff.errors import AttentionError, HeadoffError
from headoff.harness.exceptions import describe_exception

TIME_LIMIT = 600.0
"""Seconds; a patch may compile kernels when it is called first."""

SHAPES = {"encoder_self": (144, 144), "decoder_self": (100, 100), "decoder_cross": (200, 144)}
"""Queries and keys of the first calls, by site: those of the bundled model."""


@functools.cache
def preflight(attention: str, device: str, dtype: str) -> None:
    """Raise AttentionError, one sentence, where the attention cannot be tested at all."""
    known = resolve_attention(attention)  # a wrong name or import needs no other process
    if attention in attention_names():
        first_calls(known, attention, torch.device(device), torch_dtype(dtype))  # headoff's own do no harm
        return
    asked = json.dumps([attention, device, dtype])
    command = [sys.executable, "-c", _PROGRAM, asked, json.dumps(sys.path)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        raise AttentionError(
            f"{attention} did not come back from its first calls within {TIME_LIMIT:.0f} s: look for a deadlock, or "
            "for a loop that does not end"
        ) from None
    if run.returncode == 0:
        return
    *_, last = run.stdout.strip().splitlines() or [""]
    if last.startswith(_ANSWER):
        raise AttentionError(last.removeprefix(_ANSWER))
    raise AttentionError(
        f"{attention} ended its process {_cause(run.returncode)} when it was called: debug it"
    )


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
            except Exception as error:
                raise AttentionError(f"{label} raised {describe_exception(error)} when {where}") from error
            _check(context, query, label, where)
            try:
                torch.autograd.grad(context.sum(), (query, key, value), allow_unused=True)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except Exception as error:
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


def _cause(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def answer(asked: str) -> int:
    """What the other process does: exit code 0, or 1 and a sentence on its standard output."""
    spec, device, dtype = json.loads(asked)
    try:
        first_calls(resolve_attention(spec), spec, torch.device(device), torch_dtype(dtype))
    except HeadoffError as error:
        print(f"\n{_ANSWER}{error}")
        return 1
    return 0


_ANSWER = "headoff-preflight: "
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from headoff.harness.plugin.preflight import answer; sys.exit(answer(sys.argv[1]))"
)
