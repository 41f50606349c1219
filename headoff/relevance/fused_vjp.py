"""The attention's backward pass in Triton: cams and gradients, without a T x S matrix per head in memory.

For float32 on CUDA, and for cams that are products with the gradient (rules `gradient` and `centred`). The kernels, and
how the work is divided, are documented in `headoff.relevance.fused_kernels`, which the first launch imports. Everything
is float32, except for the products of the kernels, which have `precision`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from headoff.attention.fused import device_guard, unsupported_gpu
from headoff.calls import Attend
from headoff.errors import SettingError, root_cause_line
from headoff.relevance.attention_vjp import AttentionVjp, CamRule, centred_threshold
from headoff.relevance.records import AttentionRecord, select_runs

Precision = Literal["ieee", "tf32", "tf32x3"]

RULES: tuple[CamRule, ...] = ("gradient", "centred")

MAX_CHANNELS = 128

PARTIAL = 2**26
"""Default number of elements in the partial results of one launch."""

MOST_PAIRS = 65535
"""Maximum size of the second dimension of a grid in CUDA."""

ENOUGH_PROGRAMS = 528
"""Four for each of the 132 multiprocessors of an H100 or H200; rows are divided into shares to have that many."""


class Tiling(NamedTuple):
    """Rows and keys of a tile, and the warps and pipeline stages of a program."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiling(channels: int) -> Tiling:
    """The tiles of all kernels, by the channels of a head. Exact products keep their operands in registers."""
    return Tiling(64, 64, 8, 2) if channels <= 32 else Tiling(32, 32, 8, 2)


class FusedVjp(AttentionVjp):
    """`AttentionVjp` for float32 tensors on CUDA, or on the CPU with `TRITON_INTERPRET=1`.

    Args:
        record, rule, attend, dtype: see `AttentionVjp`; `rule` is one of `RULES`.
        tile: number of elements in the partial results of one launch, which limits the pairs of a launch.
        precision: of products: `"ieee"` is full float32, `"tf32"` has 11 bits, `"tf32x3"` uses three such products for
            one.

    Raises:
        SettingError: the kernels do not support these arguments; also raised by calls, if a kernel cannot be compiled
            or launched.
    """

    def __init__(
        self,
        record: AttentionRecord,
        rule: CamRule,
        attend: Attend | None = None,
        dtype: torch.dtype | None = None,
        tile: int = PARTIAL,
        *,
        precision: Precision = "ieee",
    ) -> None:
        super().__init__(record, rule, attend, dtype, tile)
        reason = unsupported(record.query.device, record.query.dtype, rule, record.query.shape[3])
        if reason is not None:
            raise SettingError(f"{reason}: use kernels='auto', which chooses supported ones")
        if precision not in get_args(Precision):
            raise SettingError(
                f"precision cannot be {precision!r}: use one of {', '.join(get_args(Precision))}"
            )
        self._precision = precision
        self._tiling = tiling(record.query.shape[3])
        self._mask = None if record.keys is None else record.keys.contiguous()

    def right(
        self,
        grad_context: Tensor | None,
        runs: Tensor,
        vectors: Tensor,
        contribution: Tensor | None = None,
    ) -> Tensor:
        if contribution is not None:  # there is no kernel for it
            return super().right(grad_context, runs, vectors, contribution)
        all_inputs, (key_blocks, row_blocks) = self._inputs(grad_context, runs), self._blocks()
        result = vectors.new_empty(len(runs), self.record.query.shape[2])
        for batch in self._launches(len(runs), key_blocks * result.shape[1]):
            part = all_inputs.select(batch)
            partial = vectors.new_empty(key_blocks, *result[batch].shape)
            self._launch(
                "right_kernel",
                key_blocks * row_blocks,
                part,
                part.threshold,
                vectors[batch].contiguous(),
                partial,
            )
            torch.sum(partial, 0, out=result[batch])
        return result

    def left(
        self,
        grad_context: Tensor | None,
        runs: Tensor,
        vectors: Tensor,
        contribution: Tensor | None = None,
    ) -> Tensor:
        if contribution is not None:
            return super().left(grad_context, runs, vectors, contribution)
        all_inputs, (key_blocks, row_blocks) = self._inputs(grad_context, runs), self._blocks()
        pairs, layers, queries = vectors.shape
        # As few shares as give enough programs, as every share is a partial result.
        blocks_of_share = -(-row_blocks // max(1, -(-ENOUGH_PROGRAMS // (key_blocks * pairs))))
        shares = -(-row_blocks // blocks_of_share)
        result = vectors.new_empty(pairs, layers, self.record.key.shape[2])
        for batch in self._launches(pairs, shares * result[0].numel()):
            part = all_inputs.select(batch)
            partial = vectors.new_empty(shares, *result[batch].shape)
            self._launch(
                "left_kernel",
                key_blocks * shares,
                part,
                part.threshold,
                vectors[batch].contiguous(),
                partial,
                layers,
                blocks_of_share * self._tiling.rows,
                BLOCK_M=max(16, 1 << (layers - 1).bit_length()),
            )
            torch.sum(partial, 0, out=result[batch])
        return result

    def _analytic(
        self,
        grad_context: Tensor | None,
        runs: Tensor,
        cam: bool,
        inputs: bool,
        contribution: Tensor | None,
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
        if contribution is not None:
            return super()._analytic(grad_context, runs, cam, inputs, contribution)
        all_inputs, (key_blocks, row_blocks) = self._inputs(grad_context, runs), self._blocks()
        query, key = self.record.query, self.record.key
        _, heads, queries, channels = query.shape
        cams = query.new_empty(len(runs), queries, key.shape[2]) if cam else None
        input_gradients = None
        if inputs:
            grad_query, grad_key, grad_value = (
                query.new_empty(len(runs), *x.shape[1:]) for x in (query, key, key)
            )
            input_gradients = grad_query, grad_key, grad_value
        scale = 1 / math.sqrt(channels)
        for batch in self._launches(len(runs), key_blocks * query[0].numel() if inputs else 0):
            part = all_inputs.select(batch)
            partial = (
                None if input_gradients is None else query.new_empty(key_blocks, *grad_query[batch].shape)
            )
            self._launch(
                "cam_kernel",
                key_blocks * row_blocks,
                part,
                part.threshold,
                None if cams is None else cams[batch],
                partial,
                scale,
            )
            if partial is not None:
                torch.sum(partial, 0, out=grad_query[batch])
                self._launch(
                    "key_value_gradient_kernel", key_blocks * heads, part, grad_key[batch], grad_value[batch]
                )
        return cams, input_gradients

    def _inputs(self, grad_context: Tensor | None, runs: Tensor) -> _Inputs:
        gated, centre = self._gated(grad_context, runs)
        threshold = None
        if self.rule == "centred":
            threshold = centred_threshold(gated, select_runs(self._largest_value, runs)).contiguous()
        return _Inputs(runs, gated, centre.contiguous(), threshold)

    def _blocks(self) -> tuple[int, int]:
        """Numbers of blocks of keys and of blocks of rows."""
        keys, rows = self.record.key.shape[2], self.record.query.shape[2]
        return -(-keys // self._tiling.keys), -(-rows // self._tiling.rows)

    def _launches(self, pairs: int, numbers: int) -> list[slice]:
        """The pairs of each launch, if a pair has partial results of `numbers` elements."""
        at_once = max(1, min(MOST_PAIRS, self._tile // max(numbers, 1)))
        return [slice(start, start + at_once) for start in range(0, pairs, at_once)]

    def _launch(self, kernel: str, programs: int, part: _Inputs, *rest: Any, **constants: Any) -> None:
        """Launch `programs` programs for every pair of `part`; `rest` are arguments of this kernel only."""
        record = self.record
        _, heads, queries, channels = record.query.shape
        given = (record.scaled_query, record.key, record.value, self._mask, record.log_sum)
        try:
            launch = getattr(_kernels(), kernel)[(programs, len(part.runs))]
            with device_guard(record.query):
                launch(
                    part.runs,
                    *given,
                    part.gated,
                    part.centre,
                    *rest,
                    heads=heads,
                    queries=queries,
                    length=record.key.shape[2],
                    CHANNELS=channels,
                    BLOCK_D=max(16, 1 << (channels - 1).bit_length()),
                    BLOCK_Q=self._tiling.rows,
                    BLOCK_K=self._tiling.keys,
                    KEYS_BY_RUN=len(record.key) > 1,
                    PRECISION=self._precision,
                    num_warps=self._tiling.warps,
                    num_stages=self._tiling.stages,
                    # Explicit, because Triton's default, whether a * b + c is rounded once or twice, has changed.
                    enable_fp_fusion=True,
                    **constants,
                )
        except Exception as error:  # Triton's errors have no common base, and a C compiler may fail as well
            raise SettingError(
                f"the relevance kernels cannot run {kernel} on {record.query.device} ({root_cause_line(error)}): use "
                "kernels='torch'"
            ) from error


class _Inputs(NamedTuple):
    """The kernels' arguments in addition to the record's tensors, all contiguous.

    Attributes:
        runs: (P,) int64.
        gated: dO' (P, H, T, D).
        centre: rowsum(dO * O) (P, H, T, 1).
        threshold: the size of rounding errors of a centred gradient (P, H, T, 1), or None.
    """

    runs: Tensor
    gated: Tensor
    centre: Tensor
    threshold: Tensor | None

    def select(self, pairs: slice) -> _Inputs:
        """The inputs of a slice of pairs."""
        threshold = None if self.threshold is None else self.threshold[pairs]
        return _Inputs(self.runs[pairs], self.gated[pairs], self.centre[pairs], threshold)


def unsupported(device: torch.device, dtype: torch.dtype, rule: CamRule, channels: int) -> str | None:
    """Why the kernels do not support this, as the beginning of a sentence; None if they do."""
    if dtype != torch.float32:
        return f"the relevance kernels compute in float32, not {str(dtype).removeprefix('torch.')}"
    if rule not in RULES:
        return f"the relevance kernels compute cams by the rules {' and '.join(RULES)}, not {rule}"
    if channels > MAX_CHANNELS:
        return f"the relevance kernels take heads of up to {MAX_CHANNELS} channels, not {channels}"
    if importlib.util.find_spec("triton") is None:
        return "the relevance kernels need Triton, which is not installed"
    if device.type == "cuda":
        reason = unsupported_gpu(device)
        return None if reason is None else f"the relevance kernels do not support {device} ({reason})"
    if not _kernels().INTERPRETED:
        return (
            f"the relevance kernels run on CUDA, not on {device.type} (on the CPU only for tests, with "
            "TRITON_INTERPRET=1 set before Python starts)"
        )
    return None


@functools.cache
def _kernels() -> ModuleType:
    from headoff.relevance import fused_kernels

    return fused_kernels
