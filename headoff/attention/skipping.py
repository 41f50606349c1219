"""Attention for the rows of heads that are on only: which rows to attend, and in how many calls.

In a sweep many heads are off: half of all (head, configuration) pairs in a cumulative sweep, and half in a sweep over
all subsets. One head of one batch item is called a *stream* here. Some of its rows (queries) are on and the others off,
and only rows that are on need attention. Two rules make skipping the others faster:

- Few calls. Streams are sorted by their number of rows that are on. Streams share a call as long as the shorter ones
  have more than half as many as the longest. They are padded with rows that are off, whose context is later
  multiplied by a gate of 0. One call per stream would compute less, but torch's backward pass on the CPU divides its
  work among threads by stream, and a single stream would leave all threads but one idle.
- A cost model. Gathering rows and copying keys takes time, so the plain call is used where it is expected to be
  faster: where few heads are off, or where there are few keys.

`headoff bench --only skipping` measures both, and prints the expected ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Costs of skipping in addition to the attention that is computed. The unit is the attention of one row to one key,
# 1.4 ns in the forward pass on one thread with 32 channels. The ratios are the same in the backward pass.
ROW_COST = 125  # to gather one row of the query and to put its context back
KEY_COST = 25  # to copy one key and its value
FIXED_COST = 60_000  # to find the groups and to make the calls
WORTHWHILE = (
    0.9  # groups are computed only if a lower bound of skipping's time is below this part of the plain call's
)

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Group:
    """Streams that share one call: indices `streams` (n,), and indices `rows` (n, m) of the rows to attend in them."""

    streams: Tensor
    rows: Tensor


def plan_groups(head_gate: Tensor, query: Tensor, keys: int) -> list[Group] | None:
    """The groups that contain every row that is on; None where a plain call is faster or skipping is impossible.

    Nothing is skipped on a GPU, where reading the gate would make the host wait at every layer; nor where the gradient
    of the gate is needed, as that of a gate of 0 is not 0; nor while torch compiles, as the gate then has no values.

    Args:
        head_gate: broadcastable to (B, H, Q, 1).
        query: (B, H, Q, D).
        keys: number of keys.
    """
    on_host = head_gate.device.type == "cpu" and query.device.type == "cpu"
    if not on_host or head_gate.requires_grad or torch.compiler.is_compiling():
        return None
    rows = query.shape[:-1].numel()
    on = int(head_gate.count_nonzero()) * (rows // max(head_gate.numel(), 1))
    # A lower bound of the cost: no padding, and no stream with a part of its rows. Computing the groups takes longer
    # than a small call, so it is done only where skipping may pay.
    full_streams = on / max(query.shape[-2], 1)
    if on and _cost(on, full_streams, keys) >= WORTHWHILE * rows * keys:
        return None
    groups = group_streams(head_gate, query)
    return groups if not groups or expected_ratio(groups, query, keys) < 1 else None


def group_streams(head_gate: Tensor, query: Tensor) -> list[Group]:
    """Groups that contain every row of `query` (B, H, Q, D) whose gate is not 0."""
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
    """Expected time of attending `groups`, divided by that of a plain call with `query` (B, H, Q, D)."""
    rows = sum(group.rows.numel() for group in groups)
    streams = sum(len(group.streams) for group in groups)
    return _cost(rows, streams, keys) / max(query.shape[:-1].numel() * keys, 1)


def _cost(rows: int, streams: float, keys: int) -> float:
    return rows * (keys + ROW_COST) + streams * keys * KEY_COST + FIXED_COST


def attend_groups(
    groups: list[Group], attend: Attend, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> Tensor:
    """Context (B, H, Q, D) by one call of `attend` per group; rows in no group are zero.

    Args:
        groups: see `group_streams`.
        attend: called with (query, key, value, attn_mask) of batch size 1, and the group's streams as heads.
        query: (B, H, Q, D).
        key, value: (B, H, S, D).
        attn_mask: 4 dimensions, broadcastable to (B, H, Q, S), or None.
    """
    batch, heads, queries, _ = query.shape
    # Zeros, computed from all three inputs, so that their gradients exist (and are 0) even if no head is on.
    context = query[..., :0] @ (key[..., :0, :1] + value[..., :0, :])
    if not groups:
        return context
    # One gather for all groups together: autograd would allocate a gradient of the full size for every gather.
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
            None if attn_mask is None else _group_mask(group, attn_mask, batch, heads),
        ).flatten(0, 2)
        for group, part, group_key, group_value in zip(groups, parts, keys, values, strict=True)
    ]
    return context.flatten(0, 2).index_copy(0, rows, torch.cat(contexts)).view_as(context)


def _group_mask(group: Group, attn_mask: Tensor, batch: int, heads: int) -> Tensor:
    """The part of `attn_mask` for `group`, (1, n or 1, m or 1, S or 1)."""
    mask = attn_mask[0]
    if attn_mask.shape[:2] != (1, 1):
        mask = attn_mask.expand(batch, heads, -1, -1)[group.streams // heads, group.streams % heads]
    if mask.shape[1] > 1:
        streams = torch.arange(len(group.streams))[:, None]
        mask = mask.expand(len(group.streams), -1, -1)[streams, group.rows]
    return mask[None]
