"""Cams of deformable attention: equation 5 on its dense equivalent, without a dense matrix.

A head's weight between query i and token t is A[i, t], the sum over sampling points of a * w_t: the point's attention
weight times its bilinear weight at the token, which is not 0 at four tokens only. The context is A V, so dA = dO V^T as
for dense attention, and all points at a token have the same dA[i, t]. Since A >= 0, relu(dA * A)[i, t] is the sum of
a * w_t * relu(dA[i, t]): one dot product for each corner of a point, which is added to the token's number. A point
outside the image has no weight, and gets no relevance.

Shapes: P pairs of (configuration, target), every one of which belongs to one of the G runs of the forward pass; H
heads, T queries, S tokens, K corners of all sampling points of a query and head, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headoff.calls import DeformableCall
from headoff.relevance.attention_vjp import CamRule, centred_threshold
from headoff.relevance.records import select_runs

TILE = 2**23
"""Numbers in a tile of gathered values."""


class SampledVjp:
    """What `AttentionVjp` is for dense attention: the cams of one call, and their products with vectors.

    Args:
        call: of one image, with runs concatenated along the query axis.
        runs: G.
        rule: how a cam is computed.
        compute: the dtype of relevance.
    """

    def __init__(self, call: DeformableCall, runs: int, rule: CamRule, compute: torch.dtype) -> None:
        weights = call.weights.detach().to(compute)
        if call.head_gate is not None:
            weights = weights * call.head_gate.detach().to(compute).transpose(1, 2)[..., None]
        self.value = call.value[0].detach().to(compute)  # (H, S, D)
        # The call with its gate in the weights, and without its graph.
        self._call = call._replace(
            value=self.value[None],
            locations=call.locations.detach().to(compute),
            weights=weights,
            head_gate=None,
        )
        tokens, weights = self._call.corner_weights()
        self.rule = rule
        # (G, H, T, K); as many numbers as weights, and half the size where they are float64
        self._tokens = _unfold(tokens[0], runs).to(torch.int32)
        self._weights = _unfold(weights[0], runs)
        self._latest: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, grad_context: Tensor | None, runs: Tensor, *, cam: bool = True, inputs: bool = False
    ) -> tuple[Tensor, None]:
        """Cams (P, T, S) from gradients of the gated context (P, H, T, D), for the pairs' runs (P,)."""
        entries, tokens = self._entries(grad_context, runs), self._tokens_of(runs)
        cams = entries.new_zeros(len(entries), entries.shape[2], self.value.shape[1])
        for head in range(entries.shape[1]):
            cams.scatter_add_(-1, tokens[:, head].long(), entries[:, head])
        return cams.clamp_min_(0) if self.rule == "gradcam" else cams, None

    def right(self, grad_context: Tensor | None, runs: Tensor, vectors: Tensor) -> Tensor:
        """Cams times vectors (P, S): (P, T)."""
        entries, tokens = self._entries(grad_context, runs), self._tokens_of(runs)
        result = entries.new_zeros(len(vectors), entries.shape[2])
        for head in range(entries.shape[1]):
            at = tokens[:, head].long().flatten(1)
            result += (vectors.gather(1, at).view_as(entries[:, head]) * entries[:, head]).sum(-1)
        return result

    def left(self, grad_context: Tensor | None, runs: Tensor, vectors: Tensor) -> Tensor:
        """Row vectors (P, M, T) times cams: (P, M, S)."""
        entries, tokens = self._entries(grad_context, runs), self._tokens_of(runs)
        result = vectors.new_zeros(*vectors.shape[:2], self.value.shape[1])
        for head in range(entries.shape[1]):
            at = tokens[:, head].long().flatten(1)
            for row in range(vectors.shape[1]):
                products = (vectors[:, row, :, None] * entries[:, head]).flatten(1)
                result[:, row].scatter_add_(1, at, products)
        return result

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def tokens(self) -> int:
        """S."""
        return self.value.shape[1]

    def weights_at(self, run: int, queries: Tensor) -> Tensor:
        """Gated weights of a run at some queries (q,): (q, H, S)."""
        return self._call.weights_at(self._rows(run, queries))[0].transpose(0, 1).to(self.value)

    def points_at(self, run: int, queries: Tensor) -> Tensor:
        """Sampling points of a run at some queries (q,): x, y and gated weight, (q, H, L * P, 3)."""
        points = torch.cat((self._call.locations, self._call.weights[..., None]), -1)
        return points[0].index_select(0, self._rows(run, queries)).flatten(2, 3)

    def _rows(self, run: int, queries: Tensor) -> Tensor:
        """Queries of a run in the call, where runs are concatenated along the query axis."""
        return run * self._tokens.shape[2] + queries

    def _tokens_of(self, runs: Tensor) -> Tensor:
        return select_runs(self._tokens, runs).expand(len(runs), -1, -1, -1)

    def _entries(self, grad_context: Tensor | None, runs: Tensor) -> Tensor:
        """What each corner adds to the cam, (P, H, T, K). Those of the latest gradient are kept."""
        if self._latest is not None and grad_context is not None and self._latest[0] is grad_context:
            return self._latest[1]
        weights = select_runs(self._weights, runs).expand(len(runs), -1, -1, -1) / len(self.value)
        if self.rule == "attention":
            return weights
        assert grad_context is not None
        if self.rule == "gradcam":
            # The mean of dO V^T over all rows and columns, without computing the matrix.
            importance = (grad_context.mean(2) * self.value.mean(1)).sum(-1)
            return weights * importance[..., None, None]
        gradients = self._grad_weights(grad_context, runs)
        if self.rule == "centred":
            sums = weights.sum(-1, keepdim=True)
            mean = (weights * gradients).sum(-1, keepdim=True) / sums.masked_fill(sums == 0, 1)
            gradients = gradients - mean
            largest = self.value.norm(dim=-1, keepdim=True).amax(1, keepdim=True)
            gradients = torch.where(gradients > centred_threshold(grad_context, largest), gradients, 0)
        entries = weights * gradients.clamp_min(0)
        self._latest = grad_context, entries
        return entries

    def _grad_weights(self, grad_context: Tensor, runs: Tensor) -> Tensor:
        """dA at each corner, (P, H, T, K): the products of dO with the corner's value."""
        tokens = self._tokens_of(runs)
        pairs, heads, queries, corners = tokens.shape
        result = grad_context.new_empty(tokens.shape)
        at_once = max(1, TILE // (corners * self.value.shape[-1]))
        for pair in range(pairs):
            for head in range(heads):
                for start in range(0, queries, at_once):
                    rows = slice(start, start + at_once)
                    gathered = self.value[head][tokens[pair, head, rows].long()]  # (rows, K, D)
                    here = gathered @ grad_context[pair, head, rows, :, None]
                    result[pair, head, rows] = here[..., 0]
        return result


def _unfold(x: Tensor, runs: int) -> Tensor:
    """(H, G * T, n) as (G, H, T, n)."""
    return x.unflatten(1, (runs, -1)).transpose(0, 1)
