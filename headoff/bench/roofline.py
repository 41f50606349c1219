"""The least work of an attention call, and the time a device would take for it at best.

The roofline model (Williams, Waterman, Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 2009): a call of F operations that moves B bytes takes at least max(F / peak FLOP/s, B / peak
bytes/s). Both peaks are measured in the same run: a large matrix product and a large copy.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from headoff.bench.workloads import AttentionWorkload
from headoff.timing import Clock, TimedCall

PEAK_ROUNDS = 8
COPY_BYTES = {"cpu": 2**25, "cuda": 2**30}
"""Several times any cache."""
MATRIX_ROWS = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class Work:
    """`flops`: multiplications and additions of matrix products; `bytes`: to be read and written once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Peaks:
    """What a device reaches: FLOP/s of a large matrix product, bytes/s of a large copy."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class RooflinePoint:
    """A timed call compared with the roofline.

    Attributes:
        flops, bytes: achieved per second.
        limit: `arithmetic` or `memory`, whichever takes longer at best.
        share: of the speed that the limit allows, 0..1.
    """

    flops: float
    bytes: float
    limit: str
    share: float

    @classmethod
    def of(cls, work: Work, seconds: float, peaks: Peaks) -> RooflinePoint:
        arithmetic, memory = work.flops / peaks.flops, work.bytes / peaks.bytes
        limit = "arithmetic" if arithmetic >= memory else "memory"
        return cls(work.flops / seconds, work.bytes / seconds, limit, max(arithmetic, memory) / seconds)


def measured_peaks(device: torch.device, dtype: torch.dtype, clock: Clock) -> Peaks:
    """The peaks in `dtype`, with torch's settings (float32 without TF32, unless they were changed)."""

    def median(call: TimedCall) -> float:
        call.seconds(clock)
        return statistics.median(call.seconds(clock) for _ in range(PEAK_ROUNDS))

    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rows = MATRIX_ROWS[device.type]
    matrix = torch.randn(rows, rows, device=device).to(dtype)
    product = torch.empty_like(matrix)
    return Peaks(
        flops=2 * rows**3 / median(TimedCall(lambda: torch.mm(matrix, matrix, out=product))),
        bytes=2 * source.numel() / median(TimedCall(lambda: target.copy_(source))),
    )


def attention_work(workload: AttentionWorkload) -> Work:
    """The least work of a `forward` or `forward + backward` call: none for rows that are off, or for padding.

    Forward, every row that is on meets every key in 2 products of 2 D operations. Backward recomputes the scores, then
    dV, dP, dQ and dK: 5 products (Dao et al., "FlashAttention", NeurIPS 2022, algorithm 4). Every tensor is read or
    written once: query, key, value, gate and context forward; those, the gradient of the context and the three
    gradients backward. Rows that are off are not read, nor are keys of heads without any row on; results are written
    for all.
    """
    batch, heads, rows, channels = workload.query.shape
    keys = workload.key.shape[2]
    if workload.head_gate is None:
        rows_on, streams_on, gate = batch * heads * rows, batch * heads, 0
    else:
        on = workload.head_gate != 0
        rows_on, streams_on, gate = int(on.sum()), int(on.any(2).sum()), on.numel()
    keys_on = keys if workload.attn_mask is None else int(workload.attn_mask.sum())
    all_rows, all_keys = batch * heads * rows * channels, 2 * batch * heads * keys * channels
    read = rows_on * channels + streams_on * 2 * keys_on * channels + gate
    flops = 4 * channels * keys_on * rows_on
    numbers = read + all_rows
    if workload.direction != "forward":
        flops += 10 * channels * keys_on * rows_on
        numbers += read + 2 * rows_on * channels + all_rows + all_keys
    return Work(flops, numbers * workload.dtype.itemsize)
