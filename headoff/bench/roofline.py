"""How much work an attention call is at least, and what a device could do it in at best.

The roofline model (Williams, Waterman, Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 2009): a call of F operations that moves B bytes takes at least max(F / peak, B / bandwidth), and
whichever is larger limits it. Peak and bandwidth are measured (`headoff.bench.ceilings`), not read from a data sheet.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from headoff.bench.cases import AttentionCase


@dataclass(frozen=True)
class Work:
    """- `flops`: multiplications and additions, of products of matrices only; `bytes`: to be read and written once"""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: `flops` per second in a large matrix product, `bytes` per second in a large copy."""

    flops: float
    bytes: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Position:
    """Where a timed call stands under its roofline.

    - `flops`, `bytes`: achieved per second
    - `limit`: `arithmetic` or `memory`, which of the two takes longer at best
    - `share`: of the speed that the limit allows, 0..1
    """

    flops: float
    bytes: float
    limit: str
    share: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def attention_work(case: AttentionCase) -> Work:
    """The least work of a case: rows that are off need none, nor do keys that are padding.

    Forward, each row that is on meets each key twice: 2 products of 2 D operations. Backward makes the scores again and
    then dV, dP, dQ and dK: 5 products (Dao et al., "FlashAttention", NeurIPS 2022, algorithm 4). Every tensor is read
    or written once: forward query, key, value, gate, context; backward those, the gradient of the context, and
    the three gradients. Of query, context and its gradient only rows that are on are read, of key and value those
    of heads with any row on; results are written for all.
    """
    batch, heads, rows, channels = case.query.shape
    if case.head_gate is None:
        rows_on, streams_on, gate = batch * heads * rows, batch * heads, 0
    else:
        on = case.head_gate != 0
        rows_on, streams_on, gate = int(on.sum()), int(on.any(2).sum()), case.head_gate.numel()
    keys = case.shape.keys if case.attn_mask is None else int(case.attn_mask.sum())
    size = case.dtype.itemsize
    per_row, per_stream = channels, 2 * keys * channels
    every_row, every_key = batch * heads * rows * channels, 2 * batch * heads * case.shape.keys * channels
    flops = 4 * channels * keys * rows_on
    numbers = rows_on * per_row + streams_on * per_stream + gate + every_row
    if case.direction != "forward":
        flops += 10 * channels * keys * rows_on
        numbers += 3 * rows_on * per_row + streams_on * per_stream + gate + every_row + every_key
    return Work(flops, numbers * size)


def position(work: Work, seconds: float, ceilings: Ceilings) -> Position:
    """Of `work` that was done in `seconds`."""
    arithmetic, memory = work.flops / ceilings.flops, work.bytes / ceilings.bytes
    return Position(
        flops=work.flops / seconds,
        bytes=work.bytes / seconds,
        limit="arithmetic" if arithmetic >= memory else "memory",
        share=max(arithmetic, memory) / seconds,
    )
