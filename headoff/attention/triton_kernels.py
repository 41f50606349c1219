"""The kernels of `headoff.attention.fused`: forward, gradient of the query, gradients of key and value.

Scores are in base 2, s = log2(e) * (q k^T / sqrt(D) + mask), because the GPU's exponential is in base 2. So P =
2^(s - L), with L the base-2 log-sum-exp of the row. Softmax and accumulators are float32 whatever the inputs are.
With g the gate of a row, O its gated context, and P the weights *before* the gate::

    forward     O  = g * P V
    backward    dS = g * P * (dO V^T - delta)   with delta = rowsum(dO * O) / g, of the rows that are on
                dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D),  dV = (g * P)^T dO

These are the formulas of headoff/relevance/attention_vjp.py with a factor g taken out of dS: the gradients of key and
value then need only g * P, and the gradient of the query is multiplied by the gate at the end. delta is computed from
the context as it was returned, rounded to its dtype.

Rows that are off (g = 0) and rows without keys have L = +inf, hence P = 0, and need no branch in the backward pass.
Blocks of rows that are all off are skipped, and so are blocks of keys that a mask hides from all queries. The remaining
blocks are the bits of an integer (`_live_rows`, `_live_keys`), so that loops over them have a known length and no
branches, and can be pipelined.

Every output element has one writer, and sums have a fixed order: results are reproducible bit for bit. Offsets are
64-bit.

Importing this module imports Triton. For kernels that run on the CPU, set `TRITON_INTERPRET=1` before.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on the CPU, for tests."""

GROUP = tl.constexpr(32)
"""Blocks per group; the bits of one integer say which blocks of a group are live."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """Matrix product with a float32 result; 16-bit operands are not converted."""
    if INTERPRETED:
        # The interpreter represents bfloat16 by integers with the same bits, and would multiply those.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _stream(pointer, strides, batch, head):
    """The pointer to the beginning of one head of one batch item."""
    return pointer + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _program_block(heads, queries, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    """The block of rows of this program: index of (batch item, head), batch item, head, rows (BLOCK_Q,), channels."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    stream = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return stream, stream // heads, stream % heads, rows, tl.arange(0, BLOCK_D)


@triton.jit
def _tile(pointer, strides, rows, channels):
    """Pointers (N, D) to the elements at `rows` (N,) and `channels` (D,)."""
    return pointer + rows.to(tl.int64)[:, None] * strides[2] + channels.to(tl.int64)[None, :] * strides[3]


@triton.jit
def _gates(gate, gate_strides, rows, length):
    """The gates of `rows` in float32; rows from `length` on are off. 1 everywhere without a gate."""
    gates = rows < length
    if gate is not None:
        gates = tl.load(gate + rows.to(tl.int64) * gate_strides[2], mask=gates, other=0)
    return gates.to(tl.float32)


@triton.jit
def _key_mask(mask, mask_strides, keys, length, BY_KEY: tl.constexpr):
    """The part of the mask that is the same for all queries: whether `keys` are attended, and what their base-2
    scores are shifted by.
    """
    attended = keys < length
    term = tl.zeros(keys.shape, tl.float32)
    if BY_KEY:
        loaded = tl.load(mask + keys.to(tl.int64) * mask_strides[3], mask=attended, other=0)
        if mask.dtype.element_ty == tl.int1:
            attended = attended & loaded
        else:
            attended = attended & (loaded != float("-inf"))
            term = loaded.to(tl.float32) * LOG2_E
    return attended, term


@triton.jit
def _scores(
    products, scale, attended, term, mask, mask_strides, rows, keys, queries, length, BY_KEY: tl.constexpr
):
    """Base-2 scores, -inf where a key is hidden or does not exist.

    All but `products` are two-dimensional and broadcast to its shape, either way round.
    """
    scores = products * scale + term
    if mask is not None and not BY_KEY:
        places = mask + rows.to(tl.int64) * mask_strides[2] + keys.to(tl.int64) * mask_strides[3]
        loaded = tl.load(places, mask=(keys < length) & (rows < queries), other=0)
        if mask.dtype.element_ty == tl.int1:
            attended = attended & loaded
        else:
            scores += loaded.to(tl.float32) * LOG2_E
    return tl.where(attended, scores, float("-inf"))


@triton.jit
def _bits(live):
    """An integer with a bit for every block of `live` (GROUP, BLOCK) that has a live element, and their number."""
    alive = tl.max(live.to(tl.int32), 1)
    return tl.sum(alive.to(tl.int64) << tl.arange(0, GROUP).to(tl.int64)), tl.sum(alive)


@triton.jit
def _positions(start, BLOCK: tl.constexpr):
    return start + tl.arange(0, GROUP)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _live_keys(mask, mask_strides, start, length, BLOCK: tl.constexpr):
    """Bits and number of the blocks with a key that is attended, among the `GROUP` blocks from `start` on."""
    attended, _ = _key_mask(mask, mask_strides, _positions(start, BLOCK), length, True)
    return _bits(attended)


@triton.jit
def _live_rows(gate, gate_strides, start, end, BLOCK: tl.constexpr):
    """Bits and number of the blocks with a row that is on, among the `GROUP` blocks from `start` on."""
    return _bits(_gates(gate, gate_strides, _positions(start, BLOCK), end) != 0)


@triton.jit
def _lowest(bits):
    """The index of the lowest bit that is set."""
    # It is the exponent of that power of two as a float32, which is exact.
    return ((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _attend_keys(
    start, peak, total, context, query, key, key_strides, value, value_strides, mask, mask_strides,
    rows, channels, queries, length, scale,
    CHANNELS: tl.constexpr, BLOCK_K: tl.constexpr, BY_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the block of keys from `start` on."""
    keys = start + tl.arange(0, BLOCK_K)
    inside = (keys < length)[:, None] & (channels < CHANNELS)[None, :]
    key_tile = tl.load(_tile(key, key_strides, keys, channels), mask=inside, other=0)
    products = _dot(query, tl.trans(key_tile), PRECISION)
    attended, term = _key_mask(mask, mask_strides, keys, length, BY_KEY)
    scores = _scores(
        products, scale, attended[None, :], term[None, :],
        mask, mask_strides, rows[:, None], keys[None, :], queries, length, BY_KEY,
    )  # fmt: skip
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # -inf - -inf is NaN: a row that has seen no key yet is shifted by 0, and its terms are 2^-inf.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    terms = tl.exp2(scores - shift[:, None])
    shrunk = tl.exp2(peak - shift)
    total = total * shrunk + tl.sum(terms, 1)
    value_tile = tl.load(_tile(value, value_strides, keys, channels), mask=inside, other=0)
    context = context * shrunk[:, None] + _dot(terms.to(value_tile.dtype), value_tile, PRECISION)
    return new_peak, total, context


@triton.jit(do_not_specialize=["heads", "queries", "length"])
def forward_kernel(
    query, query_strides, key, key_strides, value, value_strides, mask, mask_strides, gate, gate_strides,
    context, context_strides, logsumexp, heads, queries, length, scale,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BY_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Context, and L where `logsumexp` (B, H, Q) is not None. One program for each block of rows of a head.

    `scale` is log2(e) / sqrt(D); `BY_KEY` says that the mask is the same for all queries.
    """
    stream, batch, head, rows, channels = _program_block(heads, queries, BLOCK_Q, BLOCK_D)
    query = _stream(query, query_strides, batch, head)
    key = _stream(key, key_strides, batch, head)
    value = _stream(value, value_strides, batch, head)
    if mask is not None:
        mask = _stream(mask, mask_strides, batch, head)
    if gate is not None:
        gate = _stream(gate, gate_strides, batch, head)
    gates = _gates(gate, gate_strides, rows, queries)
    on = gates != 0

    total = tl.zeros([BLOCK_Q], tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    summed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if tl.max(on.to(tl.int32), 0) > 0:
        inside = on[:, None] & (channels < CHANNELS)[None, :]
        query_tile = tl.load(_tile(query, query_strides, rows, channels), mask=inside, other=0)
        if BY_KEY:
            for group in range(0, length, GROUP * BLOCK_K):
                bits, live = _live_keys(mask, mask_strides, group, length, BLOCK_K)
                for _ in range(live):
                    start = group + _lowest(bits) * BLOCK_K
                    bits = bits & (bits - 1)
                    peak, total, summed = _attend_keys(
                        start, peak, total, summed, query_tile, key, key_strides, value, value_strides,
                        mask, mask_strides, rows, channels, queries, length, scale,
                        CHANNELS, BLOCK_K, BY_KEY, PRECISION,
                    )  # fmt: skip
        else:
            for start in range(0, length, BLOCK_K):
                peak, total, summed = _attend_keys(
                    start, peak, total, summed, query_tile, key, key_strides, value, value_strides,
                    mask, mask_strides, rows, channels, queries, length, scale,
                    CHANNELS, BLOCK_K, BY_KEY, PRECISION,
                )  # fmt: skip

    empty = total == 0
    weighted = summed * (gates / tl.where(empty, 1.0, total))[:, None]
    # A row that is off in a block that is not has been attended with a query of zeros: cut off, not multiplied,
    # for it is to be zero whatever its neighbours are.
    weighted = tl.where(on[:, None], weighted, 0.0)
    context = _stream(context, context_strides, batch, head)
    inside = (rows < queries)[:, None] & (channels < CHANNELS)[None, :]
    tl.store(
        _tile(context, context_strides, rows, channels), weighted.to(context.dtype.element_ty), mask=inside
    )
    if logsumexp is not None:
        sums = tl.where(empty | (on == 0), float("inf"), peak + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(logsumexp + stream.to(tl.int64) * queries + rows, sums, mask=rows < queries)


@triton.jit
def _query_gradient(
    start, gradient, query, sums, deltas, grad_context, key, key_strides, value, value_strides,
    mask, mask_strides, rows, channels, queries, length, scale,
    CHANNELS: tl.constexpr, BLOCK_K: tl.constexpr, BY_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`gradient`, ungated, plus the share of the block of keys from `start` on."""
    keys = start + tl.arange(0, BLOCK_K)
    inside = (keys < length)[:, None] & (channels < CHANNELS)[None, :]
    key_tile = tl.load(_tile(key, key_strides, keys, channels), mask=inside, other=0)
    products = _dot(query, tl.trans(key_tile), PRECISION)
    attended, term = _key_mask(mask, mask_strides, keys, length, BY_KEY)
    scores = _scores(
        products, scale, attended[None, :], term[None, :],
        mask, mask_strides, rows[:, None], keys[None, :], queries, length, BY_KEY,
    )  # fmt: skip
    weights = tl.exp2(scores - sums[:, None])
    value_tile = tl.load(_tile(value, value_strides, keys, channels), mask=inside, other=0)
    grad_weights = _dot(grad_context, tl.trans(value_tile), PRECISION)
    grad_scores = weights * (grad_weights - deltas[:, None])
    return gradient + _dot(grad_scores.to(key_tile.dtype), key_tile, PRECISION)


@triton.jit(do_not_specialize=["heads", "queries", "length"])
def query_gradient_kernel(
    query, query_strides, key, key_strides, value, value_strides, mask, mask_strides, gate, gate_strides,
    context, context_strides, grad_context, grad_context_strides, logsumexp, delta, gradient, gradient_strides,
    heads, queries, length, scale,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BY_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta, and dQ where `gradient` is not None. One program for each block of rows of a head.

    `grad_context` is dO. `delta` (B, H, Q) is for `key_value_gradient_kernel`.
    """
    stream, batch, head, rows, channels = _program_block(heads, queries, BLOCK_Q, BLOCK_D)
    query = _stream(query, query_strides, batch, head)
    key = _stream(key, key_strides, batch, head)
    value = _stream(value, value_strides, batch, head)
    if mask is not None:
        mask = _stream(mask, mask_strides, batch, head)
    if gate is not None:
        gate = _stream(gate, gate_strides, batch, head)
    gates = _gates(gate, gate_strides, rows, queries)
    on = gates != 0
    grad_context = _stream(grad_context, grad_context_strides, batch, head)
    context = _stream(context, context_strides, batch, head)

    deltas = tl.zeros([BLOCK_Q], tl.float32)
    summed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if tl.max(on.to(tl.int32), 0) > 0:
        inside = on[:, None] & (channels < CHANNELS)[None, :]
        grad_tile = tl.load(_tile(grad_context, grad_context_strides, rows, channels), mask=inside, other=0)
        context_tile = tl.load(_tile(context, context_strides, rows, channels), mask=inside, other=0)
        deltas = tl.sum(grad_tile.to(tl.float32) * context_tile.to(tl.float32), 1)
        deltas = deltas / tl.where(on, gates, 1.0)
        if gradient is not None:
            query_tile = tl.load(_tile(query, query_strides, rows, channels), mask=inside, other=0)
            sums = tl.load(
                logsumexp + stream.to(tl.int64) * queries + rows, mask=rows < queries, other=float("inf")
            )
            if BY_KEY:
                for group in range(0, length, GROUP * BLOCK_K):
                    bits, live = _live_keys(mask, mask_strides, group, length, BLOCK_K)
                    for _ in range(live):
                        start = group + _lowest(bits) * BLOCK_K
                        bits = bits & (bits - 1)
                        summed = _query_gradient(
                            start, summed, query_tile, sums, deltas, grad_tile,
                            key, key_strides, value, value_strides, mask, mask_strides,
                            rows, channels, queries, length, scale,
                            CHANNELS, BLOCK_K, BY_KEY, PRECISION,
                        )  # fmt: skip
            else:
                for start in range(0, length, BLOCK_K):
                    summed = _query_gradient(
                        start, summed, query_tile, sums, deltas, grad_tile,
                        key, key_strides, value, value_strides, mask, mask_strides,
                        rows, channels, queries, length, scale,
                        CHANNELS, BLOCK_K, BY_KEY, PRECISION,
                    )  # fmt: skip

    tl.store(delta + stream.to(tl.int64) * queries + rows, deltas, mask=rows < queries)
    if gradient is not None:
        # scale / log2(e) is 1 / sqrt(D).
        summed = tl.where(on[:, None], summed * (gates * (scale / LOG2_E))[:, None], 0.0)
        gradient = _stream(gradient, gradient_strides, batch, head)
        inside = (rows < queries)[:, None] & (channels < CHANNELS)[None, :]
        tl.store(
            _tile(gradient, gradient_strides, rows, channels),
            summed.to(gradient.dtype.element_ty),
            mask=inside,
        )


@triton.jit
def _key_value_gradient(
    start, end, grad_key, grad_value, query, query_strides, key, value, mask, mask_strides, gate, gate_strides,
    grad_context, grad_context_strides, logsumexp, delta, keys, attended, term, channels, queries, length, scale,
    CHANNELS: tl.constexpr, BLOCK_Q: tl.constexpr, BY_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`grad_key` and `grad_value` plus the shares of the block of rows from `start` on; all transposed."""
    rows = start + tl.arange(0, BLOCK_Q)
    gates = _gates(gate, gate_strides, rows, end)
    on = gates != 0
    inside = on[:, None] & (channels < CHANNELS)[None, :]
    query_tile = tl.load(_tile(query, query_strides, rows, channels), mask=inside, other=0)
    products = _dot(key, tl.trans(query_tile), PRECISION)
    scores = _scores(
        products, scale, attended[:, None], term[:, None],
        mask, mask_strides, rows[None, :], keys[:, None], queries, length, BY_KEY,
    )  # fmt: skip
    weights = tl.exp2(scores - tl.load(logsumexp + rows, mask=on, other=float("inf"))[None, :])
    grad_tile = tl.load(_tile(grad_context, grad_context_strides, rows, channels), mask=inside, other=0)
    if gate is not None:
        weights = weights * gates[None, :]
    grad_value += _dot(weights.to(grad_tile.dtype), grad_tile, PRECISION)
    grad_weights = _dot(value, tl.trans(grad_tile), PRECISION)
    grad_scores = weights * (grad_weights - tl.load(delta + rows, mask=on, other=0.0)[None, :])
    grad_key += _dot(grad_scores.to(query_tile.dtype), query_tile, PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["heads", "queries", "length", "share", "batches"])
def key_value_gradient_kernel(
    query, query_strides, key, key_strides, value, value_strides, mask, mask_strides, gate, gate_strides,
    grad_context, grad_context_strides, logsumexp, delta, grad_key, grad_key_strides, grad_value, grad_value_strides,
    batches, heads, queries, length, scale, share,
    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BY_KEY: tl.constexpr, BY_ROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV. One program for each block of keys of a head and each `share` of the rows.

    The results of share i stand at batch items i * `batches` and on of `grad_key` and `grad_value`, for the
    caller to add up. `BY_ROW` says that the gate is not the same for all queries.
    """
    blocks = tl.cdiv(length, BLOCK_K)
    part = tl.program_id(0) // blocks
    head, batch, shares_before = part % heads, part // heads % batches, part // heads // batches
    keys = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    channels = tl.arange(0, BLOCK_D)
    first = shares_before * share
    end = tl.minimum(first + share, queries)
    inside = (keys < length)[:, None] & (channels < CHANNELS)[None, :]
    query = _stream(query, query_strides, batch, head)
    grad_context = _stream(grad_context, grad_context_strides, batch, head)
    key = _tile(_stream(key, key_strides, batch, head), key_strides, keys, channels)
    value = _tile(_stream(value, value_strides, batch, head), value_strides, keys, channels)
    logsumexp += (batch.to(tl.int64) * heads + head) * queries
    delta += (batch.to(tl.int64) * heads + head) * queries

    if mask is not None:
        mask = _stream(mask, mask_strides, batch, head)
    attended, term = _key_mask(mask, mask_strides, keys, length, BY_KEY)
    alive = tl.max(attended.to(tl.int32), 0)
    if gate is not None:
        gate = _stream(gate, gate_strides, batch, head)
        if not BY_ROW:
            alive = alive * (tl.load(gate) != 0).to(tl.int32)

    key_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    if alive > 0:
        if BY_ROW:
            for group in range(first, end, GROUP * BLOCK_Q):
                bits, live = _live_rows(gate, gate_strides, group, end, BLOCK_Q)
                if live > 0:
                    # Not before the loop: a program without a live row is to load nothing.
                    key_tile = tl.load(key, mask=inside, other=0)
                    value_tile = tl.load(value, mask=inside, other=0)
                    for _ in range(live):
                        start = group + _lowest(bits) * BLOCK_Q
                        bits = bits & (bits - 1)
                        key_sum, value_sum = _key_value_gradient(
                            start, end, key_sum, value_sum, query, query_strides, key_tile, value_tile,
                            mask, mask_strides, gate, gate_strides, grad_context, grad_context_strides, logsumexp,
                            delta, keys, attended, term, channels, queries, length, scale,
                            CHANNELS, BLOCK_Q, BY_KEY, PRECISION,
                        )  # fmt: skip
        else:
            key_tile = tl.load(key, mask=inside, other=0)
            value_tile = tl.load(value, mask=inside, other=0)
            for start in range(first, end, BLOCK_Q):
                key_sum, value_sum = _key_value_gradient(
                    start, end, key_sum, value_sum, query, query_strides, key_tile, value_tile,
                    mask, mask_strides, gate, gate_strides, grad_context, grad_context_strides, logsumexp, delta,
                    keys, attended, term, channels, queries, length, scale,
                    CHANNELS, BLOCK_Q, BY_KEY, PRECISION,
                )  # fmt: skip

    batch += shares_before * batches
    grad_key = _tile(_stream(grad_key, grad_key_strides, batch, head), grad_key_strides, keys, channels)
    grad_value = _tile(
        _stream(grad_value, grad_value_strides, batch, head), grad_value_strides, keys, channels
    )
    # scale / log2(e) is 1 / sqrt(D).
    tl.store(grad_key, (key_sum * (scale / LOG2_E)).to(grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value, value_sum.to(grad_value.dtype.element_ty), mask=inside)
