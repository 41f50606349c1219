"""Vector-Jacobian products of the transformer's blocks, written out.

Relevance needs the gradient of the context at every attention, for many targets of the same forward pass. Autograd
would repeat the forward pass for each, or go one by one, and would compute gradients of weights as well. Written out,
a block's VJP is a few matrix products on a whole batch of targets: P pairs of (configuration, target), each of which
continues one of the forward pass's G runs; `runs` (P,) int64 says which.

A layer is `x + block(norm(x))` where `pre_norm`, else `norm(x + block(x))`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headoff.detr.transformer import FeedForward, MultiHeadAttention, Residual


def of_runs(x: Tensor, runs: Tensor) -> Tensor:
    """Rows `runs` (P,) of x (G, ...); x itself where G = 1, for it broadcasts."""
    return x if len(x) == 1 else x.index_select(0, runs)


@dataclass
class NormVjp:
    """Layer norm: `normal` (G, T, d) is the input with mean 0 and variance 1, `scale` (G, T, 1) what it took."""

    normal: Tensor
    scale: Tensor
    weight: Tensor

    @classmethod
    def of(cls, norm: nn.LayerNorm, x: Tensor, compute: torch.dtype) -> NormVjp:
        """From the layer norm's input x (G, T, d)."""
        x = x.to(compute)
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        scale = (variance + norm.eps).rsqrt_()
        return cls((x - mean).mul_(scale), scale, norm.weight.detach().to(compute))

    def __call__(self, gradient: Tensor, runs: Tensor) -> Tensor:
        """(P, T, d) to (P, T, d)."""
        normal, scale = of_runs(self.normal, runs), of_runs(self.scale, runs)
        weighted = gradient * self.weight
        along = (weighted * normal).mean(-1, keepdim=True)
        weighted -= weighted.mean(-1, keepdim=True)
        return weighted.addcmul_(normal, along, value=-1).mul_(scale)


@dataclass
class FeedForwardVjp:
    """Two linear layers around a ReLU: `active` (G, T, hidden) is 1 where the ReLU passed, in the compute dtype."""

    active: Tensor
    expand: Tensor
    contract: Tensor

    @classmethod
    def of(cls, block: FeedForward, hidden: Tensor, compute: torch.dtype) -> FeedForwardVjp:
        """From the hidden layer before its ReLU, (G, T, hidden)."""
        weights = (block.expand.weight.detach().to(compute), block.contract.weight.detach().to(compute))
        return cls((hidden > 0).to(compute), *weights)

    def __call__(self, gradient: Tensor, runs: Tensor) -> Tensor:
        """(P, T, d) to (P, T, d)."""
        return (gradient @ self.contract).mul_(of_runs(self.active, runs)) @ self.expand


@dataclass
class ResidualVjp:
    """The sum around a block, and its norm."""

    norm: NormVjp
    pre_norm: bool

    @classmethod
    def of(cls, residual: Residual, x: Tensor, compute: torch.dtype) -> ResidualVjp:
        return cls(NormVjp.of(residual.norm, x, compute), residual.pre_norm)

    def leave(self, gradient: Tensor, runs: Tensor) -> Tensor:
        """The gradient of the sum, which is that of the block's output as well."""
        return gradient if self.pre_norm else self.norm(gradient, runs)

    def enter(self, of_sum: Tensor, of_block: Tensor, runs: Tensor) -> Tensor:
        """The gradient of x, of those of the sum and of the block's input."""
        return of_sum + (self.norm(of_block, runs) if self.pre_norm else of_block)


class ProjectionVjp:
    """The four linear layers around an attention callable."""

    def __init__(self, attention: MultiHeadAttention, compute: torch.dtype) -> None:
        self.heads = attention.heads
        self.query, self.key, self.value, self.output = (
            layer.weight.detach().to(compute)
            for layer in (attention.query, attention.key, attention.value, attention.output)
        )
        self.of_self_attention = torch.cat((self.query, self.key, self.value))
        self.of_memory = torch.cat((self.key, self.value))

    def context(self, gradient: Tensor) -> Tensor:
        """The gradient of the context (P, H, T, D), of that of the block's output (P, T, d)."""
        return (gradient @ self.output).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @staticmethod
    def merge(*gradients: Tensor) -> Tensor:
        """Gradients (P, H, T, D) of projections, side by side: (P, T, n * d)."""
        return torch.cat([gradient.transpose(1, 2).flatten(2) for gradient in gradients], dim=-1)
