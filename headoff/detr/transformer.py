"""DETR's transformer: an encoder over image tokens, and a decoder that runs many gated copies at once.

Every attention goes through one `Attend` function given at the call, so that whoever runs the model chooses the
kernel, counts its calls or keeps its inputs. Shapes: B images, G runs (copies of the decoder under different
gates), N image tokens, Q object queries, d channels, H heads, D = d / H.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headoff.detr.config import DetrConfig
from headoff.detr.sharing import LayerGates, SharingPlan
from headoff.gates import Site


class AttentionAddress(NamedTuple):
    """Where in the model an attention call is made."""

    site: Site
    layer: int


class AttentionCall(NamedTuple):
    """The arguments of one attention call of the model, and where it is made.

    Attributes:
        address: site and layer.
        query: (B, H, Q, D).
        key, value: (B, H, S, D).
        attn_mask: broadcastable to (B, H, Q, S), or None.
        head_gate: 4 dimensions, broadcastable to (B, H, Q, 1), in the query's dtype; None where every head is on.
    """

    address: AttentionAddress
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    head_gate: Tensor | None


Attend = Callable[[AttentionCall], Tensor]
"""Computes the context (B, H, Q, D) of an attention call."""


class Interceptor(Protocol):
    """Computes the context in the place of `proceed(call)`, which computes it as if the interceptor were not there."""

    def __call__(self, call: AttentionCall, proceed: Attend) -> Tensor: ...


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """`torch.autocast` to `dtype`; for None, nothing: whoever calls may have an autocast of their own."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class MultiHeadAttention(nn.Module):
    """Projections around an attention callable."""

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

    def forward(
        self,
        query_input: Tensor,
        key_input: Tensor,
        value_input: Tensor,
        attend: Attend,
        attn_mask: Tensor | None = None,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        """(B, Q, d), (B, S, d), (B, S, d) to (B, Q, d).

        `head_gate` has 4 dimensions, broadcastable to (B, H, Q, 1), in any dtype.
        """
        query = self.split(self.query(query_input))
        key, value = self.split(self.key(key_input)), self.split(self.value(value_input))
        if head_gate is not None:
            # Under autocast the query is of another dtype than the weights and the gate.
            head_gate = head_gate.to(query.dtype)
        context = attend(AttentionCall(self.address, query, key, value, attn_mask, head_gate))
        return self.output(context.transpose(-2, -3).flatten(-2))


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.relu(self.expand(x)))


class Residual(nn.Module):
    """Layer norm after the sum (post-norm, the published models) or before the block (pre-norm)."""

    def __init__(self, width: int, pre_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.pre_norm = pre_norm

    def enter(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.pre_norm else x

    def leave(self, x: Tensor, update: Tensor) -> Tensor:
        return x + update if self.pre_norm else self.norm(x + update)


class EncoderLayer(nn.Module):
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
        x = self.self_residual.leave(
            x, self.self_attention(placed, placed, entered, attend, attn_mask, head_gate)
        )
        return self.feedforward_residual.leave(x, self.feedforward(self.feedforward_residual.enter(x)))


class Encoder(nn.Module):
    """The encoder stack; a final norm only where the layers are pre-norm, as in the reference code.

    `autocast_dtype`: see `Detector.autocasting`. What goes from layer to layer stays in the weights' dtype.
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

    def attend_queries(self, x: Tensor, positions: Tensor, attend: Attend, gate: Tensor | None) -> Tensor:
        """Self-attention of each run's queries. x (B, G, Q, d), positions broadcastable to it, gate (G, Q|1, H).

        Gates here and below are on x's device, in its dtype.
        """
        images, runs = x.shape[:2]
        entered = self.self_residual.enter(x)
        placed = (entered + positions).flatten(0, 1)
        if gate is not None:
            gate = gate.transpose(1, 2).unsqueeze(-1).repeat(images, 1, 1, 1)
        update = self.self_attention(placed, placed, entered.flatten(0, 1), attend, None, gate)
        return self.self_residual.leave(x, update.unflatten(0, (images, runs)))

    def attend_memory(
        self,
        x: Tensor,
        positions: Tensor,
        memory: Tensor,
        memory_positions: Tensor,
        attend: Attend,
        attn_mask: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        """Cross-attention of every run's queries to the one memory (B, N, d).

        Rows of cross-attention do not see each other, so the runs are laid end to end along the query axis:
        keys and values are projected once and never copied per run.
        """
        runs, queries = x.shape[1:3]
        placed = (self.cross_residual.enter(x) + positions).flatten(1, 2)
        if gate is not None:
            gate = gate.expand(-1, queries, -1).flatten(0, 1).T[None, :, :, None]
        update = self.cross_attention(placed, memory + memory_positions, memory, attend, attn_mask, gate)
        return self.cross_residual.leave(x, update.unflatten(1, (runs, queries)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.feedforward_residual.leave(x, self.feedforward(self.feedforward_residual.enter(x)))


class Decoder(nn.Module):
    """The decoder stack with its final norm. `autocast_dtype`: as of the `Encoder`."""

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
    ) -> Tensor:
        """Queries after every layer, or after the last one alone, normalised.

        Args:
            x: (B, G, Q, d) the queries' content, zeros in DETR; G = 1 where a `plan` splits the runs.
            query_positions: broadcastable to (B, G, Q, d), for every number of runs the plan has.
            memory, memory_positions: (B, N, d).
            attn_mask: (B, 1, 1, N) bool, True = attend, or None.
            plan: gates and the runs they split into; None for all heads on.

        Returns:
            (layers or 1, B, G', Q, d), G' = number of final runs. Earlier layers' runs are repeated to it.
        """
        if plan is not None:
            plan = plan.to(x.device, x.dtype)
        after: list[Tensor] = []
        with autocast(x.device, self.autocast_dtype):
            for index, layer in enumerate(self.layers):
                assert isinstance(layer, DecoderLayer)
                self_step, cross_step = (
                    (plan.self_attention[index], plan.cross_attention[index]) if plan else (_ALL_ON, _ALL_ON)
                )
                x, after = _continue_runs(x, after, self_step)
                x = layer.attend_queries(x, query_positions, attend, self_step.gate)
                x, after = _continue_runs(x, after, cross_step)
                x = layer.attend_memory(
                    x, query_positions, memory, memory_positions, attend, attn_mask, cross_step.gate
                )
                x = layer.feed_forward(x)
                if every_layer or layer is self.layers[-1]:
                    after.append(x)
            return self.norm(torch.stack(after))


_ALL_ON = LayerGates(None, None)


def _continue_runs(x: Tensor, after: list[Tensor], step: LayerGates) -> tuple[Tensor, list[Tensor]]:
    if step.parent is None:
        return x, after
    parent = step.parent
    return x.index_select(1, parent), [earlier.index_select(1, parent) for earlier in after]
