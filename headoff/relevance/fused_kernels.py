"""The kernels of `headoff.relevance.fused_vjp`: cam and gradient of the query; gradients of key and value; cam
products.

With P the weights before the gate, recomputed from query, key and log-sum-exp, dO' = gate * dO, and W = P * (dO' V^T),
the equations are those of `headoff.relevance.attention_vjp`:

    cam = mean over heads of relu(W)       dS = P * (dO' V^T - rowsum(dO * O))
    dQ = dS K / sqrt(D)                    dK = dS^T Q / sqrt(D),  dV = P^T dO'

How the work is divided among programs. A cam is a sum over heads, dQ is a sum over keys, dK and dV are sums over
rows, so no program can compute all of them without partial results. These are the alternatives, with their numbers of
products (rows x D) times (D x keys) per pair and head. Times are calculated, not measured: for a layer of R50's
encoder (850 x 850, 8 heads, 32 channels, 45 pairs), tiles of 64 x 64, 45 TFLOP/s and 4.8 TB/s.

- 5 products (1.9 ms), all in one kernel: two of the three gradients are summed by atomics, in no fixed order, or all
  three as partial results of each tile. Partial results are 14 times as large as dQ, dK and dV: 1.6 GB, 0.7 ms to
  write and read.
- 7 products (2.6 ms), the choice here: a program of `cam_kernel` loops over heads for one tile of a cam, and writes
  the tile once, with its share of dQ (3 products). There is one share per block of keys, and the caller adds them: 14
  times dQ, 0.55 GB, 0.2 ms. A program of `key_value_gradient_kernel` loops over rows for one block of keys of a head
  (4 products). A program of `cam_kernel` that loops over keys for a block of rows could accumulate dQ in registers.
  But then the loop over heads is the outer one, and the cam is read and written once per head: 15 passes over 130 MB,
  which fit into the cache, but 31 GB per layer on a grid of 3,400 tokens, which do not.
- 9 products (3.3 ms): a kernel for cams, and the usual two kernels for gradients. There are no partial results, but 29%
  more products, which are the bottleneck in float32.

Blocks of rows with dO' = 0 (heads that are off, queries that the target does not depend on) are skipped, and so are
blocks of keys that are all padding. Every element has one writer, and sums have a fixed order: results are
reproducible bit for bit. Offsets are 64-bit. All tensors are contiguous.

Importing this module imports Triton. For kernels that run on the CPU, set `TRITON_INTERPRET=1` before.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on the CPU, for tests."""

UNALIGNED = ["runs", "log_sum", "centre", "threshold", "vectors", "result"]
"""Arguments that are read element by element; without this, kernels would be compiled again for unaligned pairs."""


@triton.jit
def _load_rows(tensor, stream, length, rows, channels, CHANNELS: tl.constexpr):
    """Load `rows` x `channels` of item `stream` of a tensor (..., length, CHANNELS); zeros outside of it."""
    places = (stream * length + rows)[:, None] * CHANNELS + channels[None, :]
    return tl.load(tensor + places, mask=(rows < length)[:, None] & (channels < CHANNELS)[None, :], other=0.0)


@triton.jit
def _load_numbers(tensor, stream, length, rows):
    """Load `rows` of item `stream` of a tensor (..., length); zeros outside of it."""
    return tl.load(tensor + stream * length + rows, mask=rows < length, other=0.0)


@triton.jit
def _attended(mask, keys, length):
    """Which `keys` exist and are not padding."""
    attended = keys < length
    if mask is not None:
        attended = attended & (tl.load(mask + keys, mask=attended, other=0) != 0)
    return attended


@triton.jit
def _any(tile):
    """Whether any element of a tile is not zero; NaN counts as not zero."""
    return tl.max(tl.max((tile != 0).to(tl.int32), 1), 0) > 0


@triton.jit
def _cam_tile(
    runs, query, key, value, mask, log_sum, gated, centre, threshold, grad_query,
    pair, share, rows, keys, heads, queries, length, scale,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    KEYS_BY_RUN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the cam of `pair`. If `grad_query` is not None, its share number `share` of dQ is written too."""
    channels = tl.arange(0, BLOCK_D)
    run = tl.load(runs + pair)
    key_run = run if KEYS_BY_RUN else run * 0
    attended = _attended(mask, keys, length)
    any_key = tl.max(attended.to(tl.int32), 0) > 0
    cam = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for head in range(heads):
        stream = pair * heads + head
        gated_tile = _load_rows(gated, stream, queries, rows, channels, CHANNELS)
        gradient = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        if _any(gated_tile) & any_key:
            query_stream = run * heads + head
            key_stream = key_run * heads + head
            key_tile = _load_rows(key, key_stream, length, keys, channels, CHANNELS)
            query_tile = _load_rows(query, query_stream, queries, rows, channels, CHANNELS)
            scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
            sums = _load_numbers(log_sum, query_stream, queries, rows)
            weights = tl.where(attended[None, :], tl.exp(scores - sums[:, None]), 0.0)
            value_tile = _load_rows(value, key_stream, length, keys, channels, CHANNELS)
            grad_weights = tl.dot(gated_tile, tl.trans(value_tile), input_precision=PRECISION)
            centred = grad_weights - _load_numbers(centre, stream, queries, rows)[:, None]
            if threshold is None:
                weighted = weights * grad_weights
                cam += tl.where(weighted < 0, 0.0, weighted)  # not tl.maximum, which turns NaN into 0
            else:
                over = centred > _load_numbers(threshold, stream, queries, rows)[:, None]
                cam += tl.where(over, weights * centred, 0.0)
            if grad_query is not None:
                gradient = tl.dot(weights * centred, key_tile, input_precision=PRECISION)
        if grad_query is not None:
            pairs_before = share.to(tl.int64) * tl.num_programs(1) + pair
            places = ((pairs_before * heads + head) * queries + rows)[:, None] * CHANNELS + channels[None, :]
            inside = (rows < queries)[:, None] & (channels < CHANNELS)[None, :]
            tl.store(grad_query + places, gradient * scale, mask=inside)
    return cam / heads


@triton.jit(do_not_specialize=["heads", "queries", "length"], do_not_specialize_on_alignment=UNALIGNED)
def cam_kernel(
    runs, query, key, value, mask, log_sum, gated, centre, threshold, cam, grad_query, scale,
    heads, queries, length,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    KEYS_BY_RUN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles of `cam` (P, T, S), and dQ in shares, `grad_query` (blocks of keys, P, H, T, D); either may be None.

    One program for each tile (keys vary fastest) and each pair. `query` has been multiplied by 1 / sqrt(D); dQ is
    multiplied by `scale`, which is the same.
    """
    blocks = tl.cdiv(length, BLOCK_K)
    share = tl.program_id(0) % blocks
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = share.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    pair = tl.program_id(1).to(tl.int64)
    tile = _cam_tile(
        runs, query, key, value, mask, log_sum, gated, centre, threshold, grad_query,
        pair, share, rows, keys, heads, queries, length, scale,
        CHANNELS, BLOCK_D, BLOCK_Q, BLOCK_K, KEYS_BY_RUN, PRECISION,
    )  # fmt: skip
    if cam is not None:
        places = (pair * queries + rows)[:, None] * length + keys[None, :]
        tl.store(cam + places, tile, mask=(rows < queries)[:, None] & (keys < length)[None, :])


@triton.jit(do_not_specialize=["heads", "queries", "length"], do_not_specialize_on_alignment=UNALIGNED)
def key_value_gradient_kernel(
    runs, query, key, value, mask, log_sum, gated, centre, grad_key, grad_value, heads, queries, length,
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
    query_stream = tl.load(runs + pair) * heads + head
    key_stream = query_stream if KEYS_BY_RUN else head
    attended = _attended(mask, keys, length)
    key_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    if tl.max(attended.to(tl.int32), 0) > 0:
        key_tile = _load_rows(key, key_stream, length, keys, channels, CHANNELS)
        value_tile = _load_rows(value, key_stream, length, keys, channels, CHANNELS)
        for start in range(0, queries, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            gated_tile = _load_rows(gated, stream, queries, rows, channels, CHANNELS)
            if _any(gated_tile):
                query_tile = _load_rows(query, query_stream, queries, rows, channels, CHANNELS)
                scores = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION)
                sums = _load_numbers(log_sum, query_stream, queries, rows)
                weights = tl.where(attended[:, None], tl.exp(scores - sums[None, :]), 0.0)
                value_sum += tl.dot(weights, gated_tile, input_precision=PRECISION)
                grad_weights = tl.dot(value_tile, tl.trans(gated_tile), input_precision=PRECISION)
                grad_scores = weights * (grad_weights - _load_numbers(centre, stream, queries, rows)[None, :])
                key_sum += tl.dot(grad_scores, query_tile, input_precision=PRECISION)
    places = (stream * length + keys)[:, None] * CHANNELS + channels[None, :]
    inside = (keys < length)[:, None] & (channels < CHANNELS)[None, :]
    tl.store(grad_key + places, key_sum, mask=inside)
    tl.store(grad_value + places, value_sum, mask=inside)


@triton.jit(do_not_specialize=["heads", "queries", "length"], do_not_specialize_on_alignment=UNALIGNED)
def right_kernel(
    runs, query, key, value, mask, log_sum, gated, centre, threshold, vectors, result, heads, queries, length,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    KEYS_BY_RUN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cams times `vectors` (P, S), in shares: `result` (blocks of keys, P, T). Programs as in `cam_kernel`."""
    blocks = tl.cdiv(length, BLOCK_K)
    share = tl.program_id(0) % blocks
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = share.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    pair = tl.program_id(1).to(tl.int64)
    tile = _cam_tile(
        runs, query, key, value, mask, log_sum, gated, centre, threshold, None,
        pair, share, rows, keys, heads, queries, length, 1.0,
        CHANNELS, BLOCK_D, BLOCK_Q, BLOCK_K, KEYS_BY_RUN, PRECISION,
    )  # fmt: skip
    products = tl.sum(tile * _load_numbers(vectors, pair, length, keys)[None, :], 1)
    pairs_before = share.to(tl.int64) * tl.num_programs(1) + pair
    tl.store(result + pairs_before * queries + rows, products, mask=rows < queries)


@triton.jit(
    do_not_specialize=["layers", "heads", "queries", "length", "share"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def left_kernel(
    runs, query, key, value, mask, log_sum, gated, centre, threshold, vectors, result,
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
            runs, query, key, value, mask, log_sum, gated, centre, threshold, None,
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
