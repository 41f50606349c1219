"""Vector-Jacobian products of the transformer's blocks, without autograd.

Relevance needs the gradient of the context at every attention, for many targets of the same forward pass. Autograd
would repeat the forward pass for each target or process the targets one by one, and would compute gradients of
weights as well. Here a block's VJP is a few matrix products for a batch of targets: P pairs of (configuration,
target). Every pair belongs to one of the G runs of the forward pass; `runs` (P,) int64 are their indices.

A layer is `x + block(norm(x))` with `pre_norm`, and `norm(x + block(x))` without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headoff.detr.transformer import FeedForward, MultiHeadAttention, Residual
from headoff.relevance.records import select_runs


@dataclass
class NormVjp:
    """Layer norm.

    Attributes:
        normal: (G, T, d), the input with mean 0 and variance 1.
        scale: (G, T, 1), the reciprocal standard deviation of the input.
        weight: (d,).
    """

    normal: Tensor
    scale: Tensor
    weight: Tensor

    @classmethod
    def from_input(cls, norm: nn.LayerNorm, x: Tensor, compute: torch.dtype) -> NormVjp:
        """From the layer norm's input x (G, T, d)."""
        x = x.to(compute)
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        scale = (variance + norm.eps).rsqrt_()
        return cls((x - mean).mul_(scale), scale, norm.weight.detach().to(compute))

    def __call__(self, gradient: Tensor, runs: Tensor) -> Tensor:
        """The gradient of the input from that of the output, both (P, T, d)."""
        normal, scale = select_runs(self.normal, runs), select_runs(self.scale, runs)
        weighted = gradient * self.weight
        along = (weighted * normal).mean(-1, keepdim=True)
        weighted -= weighted.mean(-1, keepdim=True)
        return weighted.addcmul_(normal, along, value=-1).mul_(scale)


@dataclass
class FeedForwardVjp:
    """Two linear layers around a ReLU.

    Attributes:
        active: (G, T, hidden), the ReLU's activation mask, 1 or 0.
        expand, contract: the layers' weights.
    """

    active: Tensor
    expand: Tensor
    contract: Tensor

    @classmethod
    def from_hidden(cls, block: FeedForward, hidden: Tensor, compute: torch.dtype) -> FeedForwardVjp:
        """From the hidden layer before its ReLU, (G, T, hidden)."""
        weights = (block.expand.weight.detach().to(compute), block.contract.weight.detach().to(compute))
        return cls((hidden > 0).to(compute), *weights)

    def __call__(self, gradient: Tensor, runs: Tensor) -> Tensor:
        """The gradient of the input from that of the output, both (P, T, d)."""
        return (gradient @ self.contract).mul_(select_runs(self.active, runs)) @ self.expand


@dataclass
class ResidualVjp:
    """The residual connection around a block, and its norm."""

    norm: NormVjp
    pre_norm: bool

    @classmethod
    def from_input(cls, residual: Residual, x: Tensor, compute: torch.dtype) -> ResidualVjp:
        """From the norm's input x (G, T, d)."""
        return cls(NormVjp.from_input(residual.norm, x, compute), residual.pre_norm)

    def grad_sum(self, gradient: Tensor, runs: Tensor) -> Tensor:
        """The gradient of the sum, which is also that of the block's output, from that of the layer's output."""
        return gradient if self.pre_norm else self.norm(gradient, runs)

    def grad_input(self, grad_sum: Tensor, grad_block: Tensor, runs: Tensor) -> Tensor:
        """The gradient of the layer's input from those of the sum and of the block's input."""
        return grad_sum + (self.norm(grad_block, runs) if self.pre_norm else grad_block)


class ProjectionVjp:
    """The four linear layers around an attention callable."""

    def __init__(self, attention: MultiHeadAttention, compute: torch.dtype) -> None:
        self.heads = attention.heads
        self.query, self.key, self.value, self.output = (
            layer.weight.detach().to(compute)
            for layer in (attention.query, attention.key, attention.value, attention.output)
        )
        self.query_key_value = torch.cat((self.query, self.key, self.value))
        self.key_value = torch.cat((self.key, self.value))

    def grad_context(self, gradient: Tensor) -> Tensor:
        """The gradient of the context (P, H, T, D) from that of the block's output (P, T, d)."""
        return (gradient @ self.output).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @staticmethod
    def merge(*gradients: Tensor) -> Tensor:
        """Gradients (P, H, T, D) of n projections, concatenated: (P, T, n * d)."""
        return torch.cat([gradient.transpose(1, 2).flatten(2) for gradient in gradients], dim=-1)
