"""DETR's transformer: an encoder over image tokens, and a decoder that computes many gated runs at once.

The caller passes the function `attend` that computes attention calls, and can so choose the kernel, count calls or
record their inputs. Shapes: B images, G runs (copies of the decoder under different gates), N image tokens, Q object
queries, d channels, H heads, D = d / H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headoff.calls import Attend, AttentionAddress, AttentionCall, Split
from headoff.detr.config import DetrConfig
from headoff.detr.sharing import LayerGates, SharingPlan
from headoff.devices import autocast

KeysValues = tuple[Tensor, Tensor]
"""Projected keys and values of an attention, (B, H, S, D)."""


class MultiHeadAttention(nn.Module):
    """Query, key, value and output projections around an attention callable."""

    def __init__(self, width: int, heads: int, address: AttentionAddress) -> None:
        super().__init__()
        self.heads = heads
        self.address = address
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """(B, tokens, d) to (B, H, tokens, D)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def project(self, key_input: Tensor, value_input: Tensor) -> KeysValues:
        """Keys and values (B, H, S, D) of (B, S, d)."""
        return self.split(self.key(key_input)), self.split(self.value(value_input))

    def forward(
        self,
        query_input: Tensor,
        keys_values: KeysValues,
        attend: Attend,
        attn_mask: Tensor | None = None,
        head_gate: Tensor | None = None,
        split_runs: Split | None = None,
    ) -> Tensor:
        """(B, Q, d) to (B, Q, d).

        Args:
            query_input: (B, Q, d).
            keys_values: see `project`.
            attend: computes the attention call.
            attn_mask: broadcastable to (B, H, Q, S), or None.
            head_gate: 4 dimensions, broadcastable to the context (B, H, Q, 1), in any dtype.
            split_runs: see `Detector.context_of`. The gate, and the output, have the rows that it makes.
        """
        query = self.split(self.query(query_input))
        key, value = keys_values
        if head_gate is not None:
            # Under autocast the query's dtype is not that of the weights and the gate.
            head_gate = head_gate.to(query.dtype)
        call = AttentionCall(self.address, query, key, value, attn_mask, head_gate)
        context = attend(call) if split_runs is None else attend(call, split_runs)
        return self.output(context.transpose(-2, -3).flatten(-2))


ROWS = 1024
"""Rows of a feed-forward block that the CPU computes at a time."""


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hooks = self.expand._forward_hooks or self.contract._forward_hooks or self.contract._forward_pre_hooks
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu" or hooks:
            return self.contract(F.relu(self.expand(x)))
        # Some rows at a time, without a copy for the ReLU: the hidden layer of many runs fits into no cache.
        parts = [self.contract(F.relu_(self.expand(rows))) for rows in x.flatten(0, -2).split(ROWS)]
        return torch.cat(parts).view_as(x)


class Residual(nn.Module):
    """A residual connection with layer norm after the sum (post-norm, as in the published DETRs) or before the block.

    A block is `leave(x, block(enter(x)))`.
    """

    def __init__(self, width: int, pre_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.pre_norm = pre_norm

    def enter(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.pre_norm else x

    def leave(self, x: Tensor, update: Tensor) -> Tensor:
        return x + update if self.pre_norm else self.norm(x + update)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward block."""

    def __init__(self, config: DetrConfig, layer: int) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(
            config.width, config.heads, AttentionAddress("encoder_self", layer)
        )
        self.self_residual = Residual(config.width, config.pre_norm)
        self.feedforward = FeedForward(config.width, config.feedforward)
        self.feedforward_residual = Residual(config.width, config.pre_norm)

    def forward(
        self, x: Tensor, positions: Tensor, attend: Attend, attn_mask: Tensor | None, head_gate: Tensor | None
    ) -> Tensor:
        """x and positions (B, N, d); `attn_mask` (B, 1, 1, N) bool; `head_gate` (1, H, N or 1, 1)."""
        entered = self.self_residual.enter(x)
        placed = entered + positions
        keys_values = self.self_attention.project(placed, entered)
        x = self.self_residual.leave(
            x, self.self_attention(placed, keys_values, attend, attn_mask, head_gate)
        )
        return self.feedforward_residual.leave(x, self.feedforward(self.feedforward_residual.enter(x)))


class Encoder(nn.Module):
    """The encoder stack, with a final norm if the layers are pre-norm, as in the original code.

    `autocast_dtype`: see `Detector.autocasting`. The residual stream stays in the weights' dtype.
    """

    autocast_dtype: torch.dtype | None = None

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.width) if config.pre_norm else nn.Identity()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        attn_mask: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """(B, N, d) to (B, N, d); `gate` (layers, N or 1, heads)."""
        with autocast(tokens.device, self.autocast_dtype):
            for index, layer in enumerate(self.layers):
                head_gate = None if gate is None else gate[index].T[None, :, :, None]
                tokens = layer(tokens, positions, attend, attn_mask, head_gate)
            return self.norm(tokens)


class DecoderLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the memory, feed-forward block."""

    def __init__(self, config: DetrConfig, layer: int) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(
            config.width, config.heads, AttentionAddress("decoder_self", layer)
        )
        self.self_residual = Residual(config.width, config.pre_norm)
        self.cross_attention = MultiHeadAttention(
            config.width, config.heads, AttentionAddress("decoder_cross", layer)
        )
        self.cross_residual = Residual(config.width, config.pre_norm)
        self.feedforward = FeedForward(config.width, config.feedforward)
        self.feedforward_residual = Residual(config.width, config.pre_norm)

    def attend_queries(
        self,
        x: Tensor,
        positions: Tensor,
        attend: Attend,
        gate: Tensor | None,
        parent: Tensor | None = None,
    ) -> Tensor:
        """Self-attention of each run's queries: (B, G, Q, d) to (B, G, Q, d).

        Args:
            x: (B, G, Q, d).
            positions: broadcastable to x.
            attend: computes the attention call.
            gate: (G, Q or 1, H), on x's device and in its dtype; None where every head is on.
            parent: (G',) for runs that split in this call, by their gates alone: `x` has the runs before the split,
                whose attention is computed once for all that continue them; the gate and the result have G'.
        """
        images, runs = x.shape[:2]
        entered = self.self_residual.enter(x)
        placed = (entered + positions).flatten(0, 1)
        if gate is not None:
            gate = gate.transpose(1, 2).unsqueeze(-1).repeat(images, 1, 1, 1)

        def split(context: Tensor) -> Tensor:
            return context.unflatten(0, (images, runs)).index_select(1, parent).flatten(0, 1)

        update = self.self_attention(
            placed,
            self.self_attention.project(placed, entered.flatten(0, 1)),
            attend,
            None,
            gate,
            None if parent is None else split,
        )
        x = x if parent is None else x.index_select(1, parent)
        return self.self_residual.leave(x, update.unflatten(0, (images, -1)))

    def project_memory(self, memory: Tensor, memory_positions: Tensor) -> KeysValues:
        """Keys and values of cross-attention, of (B, N, d)."""
        return self.cross_attention.project(memory + memory_positions, memory)

    def attend_memory(
        self,
        x: Tensor,
        positions: Tensor,
        keys_values: KeysValues,
        attend: Attend,
        attn_mask: Tensor | None,
        gate: Tensor | None,
        parent: Tensor | None = None,
    ) -> Tensor:
        """Cross-attention of all runs' queries to the memory, which they share: (B, G, Q, d) to (B, G, Q, d).

        A query's cross-attention does not depend on other queries. So the runs are concatenated along the query axis,
        and keys and values (see `project_memory`) are projected once for all runs. `parent`: see `attend_queries`.
        """
        runs, queries = x.shape[1:3]
        placed = (self.cross_residual.enter(x) + positions).flatten(1, 2)
        if gate is not None:
            gate = gate.expand(-1, queries, -1).flatten(0, 1).T[None, :, :, None]

        def split(context: Tensor) -> Tensor:
            return context.unflatten(2, (runs, queries)).index_select(2, parent).flatten(2, 3)

        update = self.cross_attention(
            placed, keys_values, attend, attn_mask, gate, None if parent is None else split
        )
        x = x if parent is None else x.index_select(1, parent)
        return self.cross_residual.leave(x, update.unflatten(1, (-1, queries)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.feedforward_residual.leave(x, self.feedforward(self.feedforward_residual.enter(x)))


class Decoder(nn.Module):
    """The decoder stack with its final norm. `autocast_dtype`: see `Detector.autocasting`."""

    autocast_dtype: torch.dtype | None = None

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self,
        x: Tensor,
        query_positions: Tensor,
        memory: Tensor,
        memory_positions: Tensor,
        attend: Attend,
        attn_mask: Tensor | None = None,
        plan: SharingPlan | None = None,
        *,
        every_layer: bool = True,
        keys_values: Sequence[KeysValues] | None = None,
        share_attention: bool = False,
    ) -> Tensor:
        """The normalised decoder states after every layer, or after the last one only.

        Args:
            x: (B, G, Q, d), the initial states, zeros in DETR; G = 1 if a `plan` splits the runs.
            query_positions: broadcastable to (B, G, Q, d) for every number of runs in the plan.
            memory, memory_positions: (B, N, d).
            attend: computes the attention calls.
            attn_mask: (B, 1, 1, N) bool, True = attend, or None.
            plan: gates, and the runs that they split the configurations into; None for all heads on.
            every_layer: return the states after every layer.
            keys_values: `project` of the memory, where that is known.
            share_attention: compute attention once for runs that split in a call by their gates alone. `attend` must
                take a second argument then, as `Detector.context_of` does.

        Returns:
            (layers or 1, B, G', Q, d) with G' final runs; states of earlier layers are repeated for the runs that
            continue them.
        """
        if plan is not None:
            plan = plan.to(x.device, x.dtype)
        after: list[Tensor] = []
        with autocast(x.device, self.autocast_dtype):
            if keys_values is not None and keys_values[0][0].dtype != _linear_dtype(x):
                keys_values = None  # projected under another autocast
            for index, layer in enumerate(self.layers):
                assert isinstance(layer, DecoderLayer)
                self_step, cross_step = (
                    (plan.self_attention[index], plan.cross_attention[index]) if plan else (_ALL_ON, _ALL_ON)
                )
                x, after, parent = _continue_runs(x, after, self_step, share_attention)
                x = layer.attend_queries(x, query_positions, attend, self_step.gate, parent)
                x, after, parent = _continue_runs(x, after, cross_step, share_attention)
                projected = (
                    keys_values[index] if keys_values else layer.project_memory(memory, memory_positions)
                )
                x = layer.attend_memory(
                    x, query_positions, projected, attend, attn_mask, cross_step.gate, parent
                )
                x = layer.feed_forward(x)
                if every_layer or layer is self.layers[-1]:
                    after.append(x)
            return self.norm(torch.stack(after))

    def project(self, memory: Tensor, memory_positions: Tensor) -> tuple[KeysValues, ...]:
        """Keys and values of each layer's cross-attention to a memory (B, N, d), which all decodes of it share."""
        with autocast(memory.device, self.autocast_dtype):
            return tuple(
                layer.project_memory(memory, memory_positions)
                for layer in self.layers
                if isinstance(layer, DecoderLayer)
            )


def _linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what linear layers make of `x`."""
    device = x.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


_ALL_ON = LayerGates(None, None)


def _continue_runs(
    x: Tensor, after: list[Tensor], step: LayerGates, share_attention: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Split the runs of `x` and of the states `after` earlier layers as `step` says.

    Where the runs share the attention of `step`, `x` is returned as it is, with the parents of its split.
    """
    parent = step.parent
    if parent is None:
        return x, after, None
    after = [earlier.index_select(1, parent) for earlier in after]
    if share_attention and step.shares_attention:
        return x, after, parent
    return x.index_select(1, parent), after, None
