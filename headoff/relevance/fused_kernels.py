"""The kernels of `headoff.relevance.fused_vjp`: a cam and the gradient of the query; of key and value; cam products.

With P the weights before the gate, made anew from query, key and log-sum-exp, dO' = gate * dO, and
W = P * (dO' V^T), the equations are those of `headoff.relevance.attention_vjp`:

    cam = mean over heads of relu(W)       dS = P * (dO' V^T - rowsum(dO * O))
    dQ = dS K / sqrt(D)                    dK = dS^T Q / sqrt(D),  dV = P^T dO'

Who owns what. A cam is a sum over heads, dQ one over keys, dK and dV are sums over rows: no program can own all of
them. Counted in products of (rows x D) with (D x keys), for each pair and head, there are these ways. Numbers are
arithmetic, not measurements: a layer of R50's encoder (850 x 850, 8 heads, 32 channels, 45 pairs), tiles of 64 x 64,
45 TFLOP/s and 4.8 TB/s.

- 5 products (1.9 ms), everything at once: two of the three gradients are added up by atomics, in no fixed order, or
  all three as partial results of each tile. Those are 14 times dQ, dK and dV: 1.6 GB, 0.7 ms to write and to read.
- 7 products (2.6 ms), what is done here: `cam_kernel` owns a tile of a cam, loops over heads within, and writes the
  tile once, with its share of dQ (3 products). Shares are one per block of keys, and the caller adds them up: 14
  times dQ, 0.55 GB, 0.2 ms. `key_value_gradient_kernel` owns a block of keys of a head and loops over rows (4
  products). If the first owned rows and looped over keys, dQ could stay in registers; but the loop over heads would
  be outside of that over keys, and the cam be read and written once a head: 15 passes over 130 MB, which the cache
  holds, but on a grid of 3,400 tokens 31 GB a layer, which it does not.
- 9 products (3.3 ms): cams by themselves, and the usual two kernels for gradients. No partial results, but 29% more of
  what float32 is bound by.

Blocks of rows whose dO' is zero (of heads that are off, or of queries that the target does not see) are not computed,
nor are blocks of keys that are all padding. Every number has one writer and sums have a fixed order: results repeat
bit for bit. Offsets are 64-bit. All tensors are contiguous.

Importing this module imports Triton. `TRITON_INTERPRET=1` has to be set before that for kernels that run on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run on the CPU, statement by statement, to be tested."""

UNALIGNED = ["runs", "log_sum", "centre", "least", "vectors", "result"]
"""What is read a number at a time, and would else be compiled for anew where pairs begin at an odd place."""


@triton.jit
def _rows_of(tensor, stream, length, rows, channels, CHANNELS: tl.constexpr):
    """`rows` x `channels` of item `stream` of a tensor (..., length, CHANNELS); zeros outside of it."""
    places = (stream * length + rows)[:, None] * CHANNELS + channels[None, :]
    return tl.load(tensor + places, mask=(rows < length)[:, None] & (channels < CHANNELS)[None, :], other=0.0)


@triton.jit
def _numbers_of(tensor, stream, length, rows):
    """`rows` of item `stream` of a tensor (..., length); zeros outside of it."""
    return tl.load(tensor + stream * length + rows, mask=rows < length, other=0.0)


@triton.jit
def _attended(mask, keys, length):
    """Which `keys` exist and are no padding."""
    attended = keys < length
    if mask is not None:
        attended = attended & (tl.load(mask + keys, mask=attended, other=0) != 0)
    return attended


@triton.jit
def _any(tile):
    """Whether a tile has a number that is not zero; NaN is not."""
    return tl.max(tl.max((tile != 0).to(tl.int32), 1), 0) > 0


@triton.jit
def _cam_tile(
    runs, query, key, value, mask, log_sum, gated, centre, least, of_query,
    pair, share, rows, keys, heads, queries, length, scale,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    KEYS_BY_RUN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the cam of `pair`. Where `of_query` is not None, share number `share` of dQ is written on the way."""
    channels = tl.arange(0, BLOCK_D)
    run = tl.load(runs + pair)
    run_of_keys = run if KEYS_BY_RUN else run * 0
    attended = _attended(mask, keys, length)
    some_keys = tl.max(attended.to(tl.int32), 0) > 0
    cam = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for head in range(heads):
        stream = pair * heads + head
        gated_tile = _rows_of(gated, stream, queries, rows, channels, CHANNELS)
        gradient = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        if _any(gated_tile) & some_keys:
            of_run = run * heads + head
            of_keys = run_of_keys * heads + head
            key_tile = _rows_of(key, of_keys, length, keys, channels, CHANNELS)
            query_tile = _rows_of(query, of_run, queries, rows, channels, CHANNELS)
            scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
            sums = _numbers_of(log_sum, of_run, queries, rows)
            weights = tl.where(attended[None, :], tl.exp(scores - sums[:, None]), 0.0)
            value_tile = _rows_of(value, of_keys, length, keys, channels, CHANNELS)
            of_weights = tl.dot(gated_tile, tl.trans(value_tile), input_precision=PRECISION)
            centred = of_weights - _numbers_of(centre, stream, queries, rows)[:, None]
            if least is None:
                weighted = weights * of_weights
                cam += tl.where(weighted < 0, 0.0, weighted)  # not tl.maximum, which makes 0 of NaN
            else:
                over = centred > _numbers_of(least, stream, queries, rows)[:, None]
                cam += tl.where(over, weights * centred, 0.0)
            if of_query is not None:
                gradient = tl.dot(weights * centred, key_tile, input_precision=PRECISION)
        if of_query is not None:
            pairs_before = share.to(tl.int64) * tl.num_programs(1) + pair
            places = ((pairs_before * heads + head) * queries + rows)[:, None] * CHANNELS + channels[None, :]
            inside = (rows < queries)[:, None] & (channels < CHANNELS)[None, :]
            tl.store(of_query + places, gradient * scale, mask=inside)
    return cam / heads


@triton.jit(do_not_specialize=["heads", "queries", "length"], do_not_specialize_on_alignment=UNALIGNED)
def cam_kernel(
    runs, query, key, value, mask, log_sum, gated, centre, least, cam, of_query, scale,
    heads, queries, length,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    KEYS_BY_RUN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles of `cam` (P, T, S), and dQ in shares, `of_query` (blocks of keys, P, H, T, D); either may be None.

    One program for each tile (blocks of keys within blocks of rows) and each pair. `query` is scaled by 1 / sqrt(D),
    and so is dQ, by `scale`.
    """
    blocks = tl.cdiv(length, BLOCK_K)
    share = tl.program_id(0) % blocks
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = share.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    pair = tl.program_id(1).to(tl.int64)
    tile = _cam_tile(
        runs, query, key, value, mask, log_sum, gated, centre, least, of_query,
        pair, share, rows, keys, heads, queries, length, scale,
        CHANNELS, BLOCK_D, BLOCK_Q, BLOCK_K, KEYS_BY_RUN, PRECISION,
    )  # fmt: skip
    if cam is not None:
        places = (pair * queries + rows)[:, None] * length + keys[None, :]
        tl.store(cam + places, tile, mask=(rows < queries)[:, None] & (keys < length)[None, :])


@triton.jit(do_not_specialize=["heads", "queries", "length"], do_not_specialize_on_alignment=UNALIGNED)
def key_value_gradient_kernel(
    runs, query, key, value, mask, log_sum, gated, centre, of_key, of_value, heads, queries, length,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    KEYS_BY_RUN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV (P, H, S, D). One program for each block of keys of each head, and each pair; all tiles transposed."""
    blocks = tl.cdiv(length, BLOCK_K)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    keys = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    pair = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    stream = pair * heads + head
    of_run = tl.load(runs + pair) * heads + head
    of_keys = of_run if KEYS_BY_RUN else head
    attended = _attended(mask, keys, length)
    key_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    if tl.max(attended.to(tl.int32), 0) > 0:
        key_tile = _rows_of(key, of_keys, length, keys, channels, CHANNELS)
        value_tile = _rows_of(value, of_keys, length, keys, channels, CHANNELS)
        for start in range(0, queries, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            gated_tile = _rows_of(gated, stream, queries, rows, channels, CHANNELS)
            if _any(gated_tile):
                query_tile = _rows_of(query, of_run, queries, rows, channels, CHANNELS)
                scores = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION)
                sums = _numbers_of(log_sum, of_run, queries, rows)
                weights = tl.where(attended[:, None], tl.exp(scores - sums[None, :]), 0.0)
                value_sum += tl.dot(weights, gated_tile, input_precision=PRECISION)
                of_weights = tl.dot(value_tile, tl.trans(gated_tile), input_precision=PRECISION)
                of_scores = weights * (of_weights - _numbers_of(centre, stream, queries, rows)[None, :])
                key_sum += tl.dot(of_scores, query_tile, input_precision=PRECISION)
    places = (stream * length + keys)[:, None] * CHANNELS + channels[None, :]
    inside = (keys < length)[:, None] & (channels < CHANNELS)[None, :]
    tl.store(of_key + places, key_sum, mask=inside)
    tl.store(of_value + places, value_sum, mask=inside)


@triton.jit(do_not_specialize=["heads", "queries", "length"], do_not_specialize_on_alignment=UNALIGNED)
def right_kernel(
    runs, query, key, value, mask, log_sum, gated, centre, least, vectors, result, heads, queries, length,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    KEYS_BY_RUN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cams times `vectors` (P, S), in shares: `result` (blocks of keys, P, T). Programs as of `cam_kernel`."""
    blocks = tl.cdiv(length, BLOCK_K)
    share = tl.program_id(0) % blocks
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = share.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    pair = tl.program_id(1).to(tl.int64)
    tile = _cam_tile(
        runs, query, key, value, mask, log_sum, gated, centre, least, None,
        pair, share, rows, keys, heads, queries, length, 1.0,
        CHANNELS, BLOCK_D, BLOCK_Q, BLOCK_K, KEYS_BY_RUN, PRECISION,
    )  # fmt: skip
    products = tl.sum(tile * _numbers_of(vectors, pair, length, keys)[None, :], 1)
    pairs_before = share.to(tl.int64) * tl.num_programs(1) + pair
    tl.store(result + pairs_before * queries + rows, products, mask=rows < queries)


@triton.jit(
    do_not_specialize=["layers", "heads", "queries", "length", "share"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def left_kernel(
    runs, query, key, value, mask, log_sum, gated, centre, least, vectors, result,
    layers, share, heads, queries, length,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, KEYS_BY_RUN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`vectors` (P, M, T) times cams, in shares of `share` rows of the cams: `result` (shares, P, M, S).

    One program for each block of keys, each share and each pair; `layers` is M.
    """
    blocks = tl.cdiv(length, BLOCK_K)
    part = tl.program_id(0) // blocks
    keys = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    pair = tl.program_id(1).to(tl.int64)
    places = tl.arange(0, BLOCK_M)
    summed = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, queries), BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q).to(tl.int64)
        tile = _cam_tile(
            runs, query, key, value, mask, log_sum, gated, centre, least, None,
            pair, part, rows, keys, heads, queries, length, 1.0,
            CHANNELS, BLOCK_D, BLOCK_Q, BLOCK_K, KEYS_BY_RUN, PRECISION,
        )  # fmt: skip
        wanted = (places < layers)[:, None] & (rows < queries)[None, :]
        vector_tile = tl.load(
            vectors + (pair * layers + places)[:, None] * queries + rows[None, :], mask=wanted, other=0.0
        )
        summed += tl.dot(vector_tile, tile, input_precision=PRECISION)
    pairs_before = part.to(tl.int64) * tl.num_programs(1) + pair
    tl.store(
        result + ((pairs_before * layers + places)[:, None] * length + keys[None, :]),
        summed,
        mask=(places < layers)[:, None] & (keys < length)[None, :],
    )
