"""Fused attention in Triton, with the gate in the kernel and without work for heads that are off.

`triton_attention` is an attention callable (`headoff.attention.contract`):

- The kernels read the gate, one number per row. Blocks of rows that are all off are skipped, forward and backward.
  The host never reads a gate, so it does not wait for the GPU.
- No tensor of size Q x S is allocated, and no input is copied: query, key, value, mask, gate and the gradient of the
  context are read by their strides, also where a batch is expanded or a mask is broadcast.
- Results are deterministic: sums have a fixed order, and tiles are chosen by shapes, never by timings.

The kernels are in `headoff.attention.triton_kernels`, which the first call imports.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from headoff.errors import AttentionError, root_cause_line

Precision = Literal["ieee", "tf32", "tf32x3"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CHANNELS = 128

MIN_CAPABILITY = (8, 0)
"""Minimum compute capability of an NVIDIA GPU. Triton does not support older ones, and its compiler may crash there."""

FEW_PROGRAMS = 264
"""Two for each of the 132 multiprocessors of an H100 or H200; with fewer programs than that, tiles have 32 rows."""

ENOUGH_PROGRAMS = 528
"""The gradients of key and value have one program per block of keys; if that is fewer than this, rows are divided."""

LEAST_SHARE = 512
"""Minimum rows of a share, as every share costs a partial result that is written, read and added."""


class Tiling(NamedTuple):
    """Rows (queries) and keys of a tile, and the warps and pipeline stages of a program."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tilings(NamedTuple):
    """The tiling of every kernel."""

    forward: Tiling
    query_gradient: Tiling
    key_value_gradient: Tiling


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    head_gate: Tensor | None = None,
    precision: Precision = "ieee",
) -> Tensor:
    """Context (B, H, Q, D) of `query` (B, H, Q, D) over `key` and `value` (B, H, S, D), in their dtype.

    Supports float32, bfloat16 and float16 and D up to 128, on CUDA devices; and on the CPU, slowly, for tests, if
    `TRITON_INTERPRET=1` was set before Triton was imported. Softmax and sums are float32. Differentiable once, with
    respect to query, key and value; the gradient of a row that is off is exactly 0.

    Args:
        query, key, value, attn_mask, head_gate: see `headoff.attention.contract`.
        precision: of products of float32 tensors. `"ieee"` is full float32; `"tf32"` uses tensor cores with 11 bits;
            `"tf32x3"` uses three such products for one, and loses about 3 bits.

    Raises:
        AttentionError: an argument is not supported (among them a mask or gate that requires a gradient), or a kernel
            cannot be compiled or launched.
    """
    _check(query, key, value, precision)
    shape = query.shape
    mask_strides = _broadcast_strides("attn_mask", attn_mask, query, (*shape[:3], key.shape[2]))
    gate_strides = _broadcast_strides("head_gate", head_gate, query, (*shape[:3], 1))
    call = _Call(attn_mask, mask_strides, head_gate, gate_strides, precision)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        context: Tensor = _Attention.apply(query, key, value, attn_mask, head_gate, call)
        return context
    return _forward(query, key, value, call, keep_logsumexp=False)[0]


class _Call(NamedTuple):
    """Arguments other than query, key and value. Strides are those of the tensors broadcast to the full shape."""

    mask: Tensor | None
    mask_strides: tuple[int, ...] | None
    gate: Tensor | None
    gate_strides: tuple[int, ...] | None
    precision: Precision

    @property
    def by_key(self) -> bool:
        """Whether there is a mask, and it is the same for all queries."""
        return self.mask_strides is not None and self.mask_strides[2] == 0

    @property
    def by_row(self) -> bool:
        """Whether there is a gate, and it is not the same for all queries."""
        return self.gate_strides is not None and self.gate_strides[2] != 0

    def arguments(self) -> tuple[Any, ...]:
        """The kernel arguments of mask and gate."""
        return self.mask, self.mask_strides, self.gate, self.gate_strides


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        head_gate: Tensor | None,
        call: _Call,
    ) -> Tensor:
        context, logsumexp = _forward(query, key, value, call, keep_logsumexp=True)
        # Mask and gate too, so that autograd detects in-place changes before the backward pass.
        ctx.save_for_backward(query, key, value, attn_mask, head_gate, context, logsumexp)
        ctx.call = call._replace(mask=None, gate=None)
        return context

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attn_mask, head_gate, context, logsumexp = ctx.saved_tensors
        call = ctx.call._replace(mask=attn_mask, gate=head_gate)
        gradients: tuple[Tensor | None, ...] = _backward(
            query, key, value, context, logsumexp, grad_context, call, ctx.needs_input_grad
        )
        if torch.is_grad_enabled():  # create_graph=True
            gradients = tuple(
                None
                if gradient is None
                else _DifferentiableOnce.apply(gradient, grad_context, query, key, value)
                for gradient in gradients
            )
        return *gradients, None, None, None


class _DifferentiableOnce(torch.autograd.Function):
    """The identity for a gradient, whose backward pass raises an error.

    torch's `once_differentiable` raises no error if the gradient of the context requires no gradient: then the
    gradients do not require any either, and second derivatives are silently wrong.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise AttentionError(
            "the triton attention is differentiable once, and a second derivative was requested: use the "
            "attention 'eager'."
        )


def _forward(
    query: Tensor, key: Tensor, value: Tensor, call: _Call, *, keep_logsumexp: bool
) -> tuple[Tensor, Tensor | None]:
    """The context, and the base-2 log-sum-exp (B, H, Q) of the scores in float32 if `keep_logsumexp`."""
    batch, heads, queries, channels = query.shape
    context = torch.empty_like(query)
    logsumexp = query.new_empty(batch, heads, queries, dtype=torch.float32) if keep_logsumexp else None
    tiling = tilings(query, key).forward
    programs = batch * heads * -(-queries // tiling.queries)
    _launch(
        "forward_kernel",
        programs,
        *_with_strides(query, key, value),
        *call.arguments(),
        *_with_strides(context),
        logsumexp,
        heads,
        queries,
        key.shape[2],
        _scale(channels),
        **_options(tiling, channels),
        BY_KEY=call.by_key,
        PRECISION=call.precision,
    )
    return context, logsumexp


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Tensor,
    logsumexp: Tensor,
    grad_context: Tensor,
    call: _Call,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and value, None where not `wanted`. One kernel computes the last two."""
    batch, heads, queries, channels = query.shape
    length = key.shape[2]
    numbers = (heads, queries, length, _scale(channels))
    tiling = tilings(query, key)
    delta = torch.empty_like(logsumexp)
    grad_query = torch.empty_like(query) if wanted[0] else None
    programs = batch * heads * -(-queries // tiling.query_gradient.queries)
    _launch(
        "query_gradient_kernel",
        programs,
        *_with_strides(query, key, value),
        *call.arguments(),
        *_with_strides(context, grad_context),
        logsumexp,
        delta,
        *((None, None) if grad_query is None else _with_strides(grad_query)),
        *numbers,
        **_options(tiling.query_gradient, channels),
        BY_KEY=call.by_key,
        PRECISION=call.precision,
    )
    if not wanted[1] and not wanted[2]:
        return grad_query, None, None
    shares, share = _shares(query, key, tiling.key_value_gradient)
    if shares == 1:
        grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    else:
        partial = query.new_empty(2, shares * batch, heads, length, channels, dtype=torch.float32)
        grad_key, grad_value = partial[0], partial[1]
    _launch(
        "key_value_gradient_kernel",
        shares * batch * heads * -(-length // tiling.key_value_gradient.keys),
        *_with_strides(query, key, value),
        *call.arguments(),
        *_with_strides(grad_context),
        logsumexp,
        delta,
        *_with_strides(grad_key, grad_value),
        batch,
        *numbers,
        share,
        **_options(tiling.key_value_gradient, channels),
        BY_KEY=call.by_key,
        BY_ROW=call.by_row,
        PRECISION=call.precision,
    )
    if shares > 1:
        grad_key, grad_value = partial.unflatten(1, (shares, batch)).sum(1).to(key.dtype).unbind()
    return grad_query, grad_key if wanted[1] else None, grad_value if wanted[2] else None


def tilings(query: Tensor, key: Tensor) -> Tilings:
    """The tiles of the three kernels for `query` (B, H, Q, D) and `key` (B, H, S, D).

    They depend on dtype and shape only, so that results are reproducible. Tensor cores work best with 64 rows; where
    that gives too few programs to occupy a GPU, tiles have 32 rows, and fewer rows that are off share a block with
    rows that are on. Accumulators and operands of these tiles fit into the registers of sm_90: for calls without
    padding, ptxas spills at most 32 bytes per thread with Triton 3.4, 3.6 and 3.9 (`tools/triton_kernels.py
    resources`). Tiles of float32 are smaller, as exact products do not run on tensor cores, and keep their operands
    in registers.
    """
    batch, heads, queries, channels = query.shape
    if query.dtype == torch.float32:
        if channels <= 64:
            row_tiling = Tiling(32, 32, 4, 2)
            return Tilings(row_tiling, row_tiling, Tiling(16, 32, 4, 2))
        return Tilings(Tiling(32, 16, 8, 2), Tiling(32, 32, 8, 2), Tiling(16, 32, 8, 2))
    rows = 32 if batch * heads * -(-queries // 64) < FEW_PROGRAMS else 64
    row_tiling = Tiling(rows, 64 if channels <= 64 else 32, 4, 2)
    if channels <= 32:
        return Tilings(row_tiling, row_tiling, Tiling(64, 64, 4, 2))
    return Tilings(row_tiling, row_tiling, Tiling(32, 64, 4 if channels <= 64 else 8, 2))


def _shares(query: Tensor, key: Tensor, tiling: Tiling) -> tuple[int, int]:
    """Number of shares that the rows are divided into for the gradients of key and value, and rows per share."""
    batch, heads, queries, _ = query.shape
    programs = batch * heads * -(-key.shape[2] // tiling.keys)
    shares = max(1, min(-(-ENOUGH_PROGRAMS // max(programs, 1)), queries // LEAST_SHARE))
    share = -(-queries // (shares * tiling.queries)) * tiling.queries
    return (-(-queries // share), share) if queries else (1, tiling.queries)


def _options(tiling: Tiling, channels: int) -> dict[str, Any]:
    return {
        "CHANNELS": channels,
        "BLOCK_D": max(16, 1 << (channels - 1).bit_length()),
        "BLOCK_Q": tiling.queries,
        "BLOCK_K": tiling.keys,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
        # Explicit, because Triton's default, whether a * b + c is rounded once or twice, has changed.
        "enable_fp_fusion": True,
    }


def _scale(channels: int) -> float:
    return math.log2(math.e) / math.sqrt(channels)


def _with_strides(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(part for tensor in tensors for part in (tensor, tensor.stride()))


def _launch(kernel: str, programs: int, query: Tensor, *rest: Any, **options: Any) -> None:
    """Launch `programs` programs of a kernel, whose first argument is the query; nothing if there are none."""
    if not programs:
        return
    launch = getattr(_kernels(), kernel)[(programs,)]
    try:
        with device_guard(query):
            launch(query, *rest, **options)
    except Exception as error:  # Triton's errors have no common base, and a C compiler may fail as well
        raise AttentionError(
            f"the triton attention cannot run its {kernel} on {query.device} ({root_cause_line(error)}): use the "
            f"attention 'sdpa'."
        ) from error


def device_guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's CUDA device the current one, on which Triton launches kernels."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.cache
def unsupported_gpu(device: torch.device) -> str | None:
    """Why the kernels do not support a CUDA device, as a clause for a message; None if they support it."""
    if torch.version.hip is not None:
        return None  # AMD's capabilities are numbered differently
    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_CAPABILITY:
        return None
    found, needed = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
    return f"the kernels need a GPU of compute capability {needed}, and this one's is {found}"


@functools.cache
def _kernels() -> ModuleType:
    try:
        from headoff.attention import triton_kernels
    except Exception as error:  # an old Triton lacks names, and a broken one may raise anything
        raise AttentionError(
            f"the triton attention cannot import Triton ({root_cause_line(error)}): install it with 'pip install "
            f"triton', or use the attention 'sdpa'."
        ) from error
    return triton_kernels


def _check(query: Tensor, key: Tensor, value: Tensor, precision: str) -> None:
    """Raise `AttentionError` for inputs that the kernels do not support."""
    shapes = query.shape, key.shape, value.shape
    if (
        query.dim() != 4
        or key.shape != value.shape
        or key.dim() != 4
        or _batch_heads_channels(query) != _batch_heads_channels(key)
    ):
        raise AttentionError(
            f"the triton attention was given query, key and value of shapes "
            f"{', '.join(str(tuple(shape)) for shape in shapes)}: make them (B, H, Q, D), (B, H, S, D) and "
            f"(B, H, S, D), with an expanded batch where one memory serves many."
        )
    if not query.dtype == key.dtype == value.dtype:
        raise AttentionError(
            f"the triton attention was given query, key and value of dtypes {query.dtype}, {key.dtype} and "
            f"{value.dtype}: convert them to one."
        )
    if query.dtype not in DTYPES:
        raise AttentionError(
            f"the triton attention has no kernel for {query.dtype}: use float32, bfloat16 or float16, or the "
            f"attention 'eager'."
        )
    if not 0 < query.shape[3] <= MAX_CHANNELS:
        raise AttentionError(
            f"the triton attention takes heads of 1 to {MAX_CHANNELS} channels, not {query.shape[3]}: use the "
            f"attention 'sdpa'."
        )
    if precision not in get_args(Precision):
        raise AttentionError(
            f"the triton attention has no precision {precision!r}: use one of {', '.join(get_args(Precision))}."
        )
    _check_device("key", key, query)
    _check_device("value", value, query)
    if query.is_cuda and (reason := unsupported_gpu(query.device)) is not None:
        raise AttentionError(f"the triton attention cannot be used on {query.device} ({reason}): use 'sdpa'.")
    if not query.is_cuda and not (query.device.type == "cpu" and _kernels().INTERPRETED):
        raise AttentionError(
            f"the triton attention was given tensors on {query.device}: move them to a CUDA device, or set "
            f"TRITON_INTERPRET=1 before Python starts to try it on the CPU."
        )


def _batch_heads_channels(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.shape[0], tensor.shape[1], tensor.shape[3]


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise AttentionError(
            f"the triton attention was given {name} on {tensor.device} and query on {query.device}: move them "
            f"to one device."
        )


def _broadcast_strides(
    name: str, tensor: Tensor | None, query: Tensor, shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Strides of `tensor` when broadcast to `shape`, 0 where it is repeated; None for None.

    Raises `AttentionError` if `tensor` does not broadcast, or the kernels do not support it.
    """
    if tensor is None:
        return None
    sizes = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    if len(sizes) > 4 or any(size not in (1, whole) for size, whole in zip(sizes, shape, strict=True)):
        raise AttentionError(
            f"{name} of shape {tuple(tensor.shape)} does not broadcast to {shape}: give each of its dimensions "
            f"that size, or 1."
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise AttentionError(
            f"the triton attention has no gradient of {name}: detach it, or use the attention 'eager'."
        )
    if name == "attn_mask" and tensor.dtype != torch.bool and not tensor.is_floating_point():
        raise AttentionError(
            f"attn_mask is of {tensor.dtype}: make it bool (True = attend), or additive float."
        )
    if tensor.is_complex():
        raise AttentionError(f"{name} is of {tensor.dtype}: make it real.")
    _check_device(name, tensor, query)
    strides = (0,) * (4 - tensor.dim()) + tensor.stride()
    return tuple(0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True))
