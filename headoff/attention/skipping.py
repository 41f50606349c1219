"""No work for heads that are off: which rows of which heads to attend, in how many calls, and doing so.

A sweep decodes many configurations at once, and a good part of its heads is off: half of all (head,
configuration) pairs in a cumulative sweep, and half in a sweep over all subsets. Call one head of one batch
item a *stream*: some of its rows (queries) are on, the others off, and only those that are on need the
attention. What makes leaving out the others pay:

- Few calls. Streams are sorted by how many of their rows are on, and share a call as long as the shorter ones
  have more than half as many as the longest; they are filled up with rows that are off, whose context meets a
  gate of 0 afterwards all the same. One call for each stream would compute less, but torch's backward pass on
  the CPU divides its work among threads by stream, and a single stream leaves all threads but one idle.
- Not at any price. Gathering rows and copying keys has a cost of its own, so the plain call is kept where it
  is expected to be faster: where few heads are off, or keys are few.

`headoff bench --only skipping` measures both ways and prints what was expected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# What skipping costs in addition to the attention that is computed, in units of the attention of one row to one key.
# Measured on one thread, forward, with 32 channels (where the unit is 1.4 ns); the backward pass keeps the ratios.
ROW_COST = 125  # to gather one row of the query and to put its context back
KEY_COST = 25  # to copy one key and its value
FIXED_COST = 60_000  # to find the groups and to make the calls
WORTHWHILE = 0.9  # of the plain call's time: what skipping has to be expected to come below, at its best

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Group:
    """Streams that share one call: `streams` (n,), and `rows` (n, m) to attend in each of them."""

    streams: Tensor
    rows: Tensor


def plan(head_gate: Tensor, query: Tensor, keys: int) -> list[Group] | None:
    """The calls that cover every row of `query` (B, H, Q, D) that is on; None where a plain call is better.

    `head_gate` is broadcastable to (B, H, Q, 1). Its values decide, so it has to be read: on a GPU that
    would make the host wait for the device at every layer, and there nothing is skipped. Nor is anything when
    the gradient of the gate is wanted (that of a gate of 0 is not 0), nor while torch compiles (there are no
    values).
    """
    on_host = head_gate.device.type == "cpu" and query.device.type == "cpu"
    if not on_host or head_gate.requires_grad or torch.compiler.is_compiling():
        return None
    rows = query.shape[:-1].numel()
    on = int(head_gate.count_nonzero()) * (rows // max(head_gate.numel(), 1))
    # The least it can cost, with no row filled up and no stream begun for a part of its rows. Finding the groups takes
    # longer than a small call: it is not begun where it could not be worth it.
    full_streams = on / max(query.shape[-2], 1)
    if on and _cost(on, full_streams, keys) >= WORTHWHILE * rows * keys:
        return None
    groups = groups_of(head_gate, query)
    return groups if not groups or expected_ratio(groups, query, keys) < 1 else None


def groups_of(head_gate: Tensor, query: Tensor) -> list[Group]:
    """The groups whose rows include every row of `query` (B, H, Q, D) that `head_gate` leaves on."""
    batch, heads, queries, _ = query.shape
    on = (head_gate != 0).expand(batch, heads, queries, 1).reshape(batch * heads, queries)
    rows_on_first = on.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    sorted_counts, streams = on.sum(1).sort(descending=True, stable=True)
    counts: list[int] = sorted_counts.tolist()
    groups = []
    start = 0
    while start < len(counts) and counts[start] > 0:
        longest = counts[start]
        end = start + sum(2 * count > longest for count in counts[start:])
        members = streams[start:end]
        groups.append(Group(members, rows_on_first[members, :longest]))
        start = end
    return groups


def expected_ratio(groups: list[Group], query: Tensor, keys: int) -> float:
    """Expected time of attending `groups` over that of the plain call with `query` (B, H, Q, D)."""
    rows = sum(group.rows.numel() for group in groups)
    streams = sum(len(group.streams) for group in groups)
    return _cost(rows, streams, keys) / max(query.shape[:-1].numel() * keys, 1)


def _cost(rows: int, streams: float, keys: int) -> float:
    return rows * (keys + ROW_COST) + streams * keys * KEY_COST + FIXED_COST


def attend_groups(
    groups: list[Group], attend: Attend, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> Tensor:
    """Context (B, H, Q, D) by one call of `attend` for each group; rows in no group are zero.

    `attend(query, key, value, attn_mask)` is given a batch of 1, with the group's streams as its heads.
    `attn_mask`, if any, has 4 dimensions.
    """
    batch, heads, queries, _ = query.shape
    # Zeros, but a product all the same: gradients of all three exist, and are 0, even when no head is on.
    context = query[..., :0] @ (key[..., :0, :1] + value[..., :0, :])
    if not groups:
        return context
    # One gather for all groups together: of each separate one, autograd would make a gradient of the full
    # size.
    streams = torch.cat([group.streams for group in groups])
    rows = torch.cat([(group.streams[:, None] * queries + group.rows).flatten() for group in groups])
    per_call = [len(group.streams) for group in groups]
    keys = key.flatten(0, 1).index_select(0, streams).split_with_sizes(per_call)
    values = value.flatten(0, 1).index_select(0, streams).split_with_sizes(per_call)
    parts = (
        query.flatten(0, 2).index_select(0, rows).split_with_sizes([group.rows.numel() for group in groups])
    )
    contexts = [
        attend(
            part.view(1, *group.rows.shape, -1),
            group_key[None],
            group_value[None],
            None if attn_mask is None else _mask_of(group, attn_mask, batch, heads),
        ).flatten(0, 2)
        for group, part, group_key, group_value in zip(groups, parts, keys, values, strict=True)
    ]
    return context.flatten(0, 2).index_copy(0, rows, torch.cat(contexts)).view_as(context)


def _mask_of(group: Group, attn_mask: Tensor, batch: int, heads: int) -> Tensor:
    """The part of `attn_mask` that belongs to `group`; dimensions of size 1 stay so and broadcast."""
    mask = attn_mask[0]
    if attn_mask.shape[:2] != (1, 1):
        mask = attn_mask.expand(batch, heads, -1, -1)[group.streams // heads, group.streams % heads]
    if mask.shape[1] > 1:
        each = torch.arange(len(group.streams))[:, None]
        mask = mask.expand(len(group.streams), -1, -1)[each, group.rows]
    return mask[None]
