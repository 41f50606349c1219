"""Rules of layer-wise relevance propagation (LRP): the relevance of an operator's inputs from that of its output.

Every operator is written once, for two sets of rules:

- `PositiveRules` are those of the published DETR code of Chefer, Gur, Wolf (ICCV 2021; the same as in Transformer
  Attribution, CVPR 2021): the z+ rule for linear layers, whose result is rescaled so that the total is kept.
- `EpsilonRules` are AttnLRP's (Achtibat et al., ICML 2024, arXiv 2402.05602): the epsilon rule, and deep Taylor
  decomposition for softmax.

Both divide relevance R by the output z that it belongs to; what they do where z is near 0 is `reciprocal`. Common to
both: ReLU and sigmoid pass relevance on unchanged (identity rule); of a product of two matrices either factor gets half
(uniform rule); a head gate is a constant and gets nothing.

Shapes: P pairs of (configuration, target), every one of which belongs to one of the G runs of the forward pass; T
tokens or queries, d channels. Operators are called with relevance (P, T, d) and `runs` (P,) int64, the pairs' runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headoff.relevance.records import select_runs


def _total(relevance: Tensor) -> Tensor:
    """The sum of a pair's relevance, (P, 1, 1)."""
    return relevance.sum((1, 2), keepdim=True)


@dataclass(frozen=True)
class LinearRelevance:
    """A linear layer: R_x = x * (weight^T (R_y / z)). The bias gets no relevance.

    Attributes:
        rules: for rescaling.
        x: (G, T, in), the input.
        reciprocal: (G, T, out), 1 / z.
        weight: (out, in).
        weight_of_negative: another weight for negative inputs, or None.
        keep_total: whether the result is rescaled to the total of the output's relevance.
    """

    rules: LrpRules
    x: Tensor
    reciprocal: Tensor
    weight: Tensor
    weight_of_negative: Tensor | None = None
    keep_total: bool = False

    def __call__(self, relevance: Tensor, runs: Tensor) -> Tensor:
        """R_x (P, T, in) from R_y (P, T, out)."""
        x = select_runs(self.x, runs)
        shares = relevance * select_runs(self.reciprocal, runs)
        found = shares @ self.weight
        if self.weight_of_negative is not None:
            found = torch.where(x > 0, found, shares @ self.weight_of_negative)
        found = found.mul_(x)
        if self.keep_total:
            found.mul_(_total(relevance) * self.rules.reciprocal(_total(found)))
        return found


@dataclass(frozen=True)
class SumRelevance:
    """A residual sum z = x + y: R_x = R * x / z, R_y = R * y / z.

    Attributes:
        first, second: x / z and y / z, (G, T, d).
        balanced: whether the two results are rescaled so that their totals are of the sign of R's, in proportion to
            their absolute values.
    """

    rules: LrpRules
    first: Tensor
    second: Tensor
    balanced: bool

    def __call__(self, relevance: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
        """R_x and R_y, (P, T, d)."""
        first = relevance * select_runs(self.first, runs)
        second = relevance * select_runs(self.second, runs)
        if self.balanced:
            totals = _total(first), _total(second)
            sizes = [total.abs() for total in totals]
            share = _total(relevance) * self.rules.reciprocal(sizes[0] + sizes[1])
            for part, total, size in zip((first, second), totals, sizes, strict=True):
                part.mul_(size * share * self.rules.reciprocal(total))
        return first, second


@dataclass(frozen=True)
class NormRelevance:
    """A layer norm whose standard deviation is a constant, so that it is a linear layer of x.

    Attributes:
        x: (G, T, d), the input.
        reciprocal: (G, T, d), 1 / y.
        weight: (G, T, d), the norm's weight over the standard deviation.
    """

    x: Tensor
    reciprocal: Tensor
    weight: Tensor

    def __call__(self, relevance: Tensor, runs: Tensor) -> Tensor:
        """R_x from R_y, (P, T, d)."""
        shares = relevance * select_runs(self.reciprocal, runs)
        shares *= select_runs(self.weight, runs)
        shares -= shares.mean(-1, keepdim=True)  # the norm subtracts the mean
        return shares.mul_(select_runs(self.x, runs))


@dataclass(frozen=True)
class FactorRelevance:
    """An operator that multiplies relevance by a factor (G, T, d), or passes it on unchanged (None)."""

    factor: Tensor | None

    def __call__(self, relevance: Tensor, runs: Tensor) -> Tensor:
        return relevance if self.factor is None else relevance * select_runs(self.factor, runs)


class LrpRules(ABC):
    """A set of rules.

    Args:
        epsilon: the stabiliser of `reciprocal`.
    """

    centred_softmax: bool
    """Whether softmax subtracts the weighted mean over a row."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    @abstractmethod
    def reciprocal(self, z: Tensor) -> Tensor:
        """1 / z, stabilised."""

    @abstractmethod
    def linear(self, layer: nn.Linear, x: Tensor, y: Tensor, *, after_relu: bool = False) -> LinearRelevance:
        """The rule of a linear layer, for its input x (G, T, in) and output y (G, T, out).

        Args:
            after_relu: no number of x is negative.
        """

    @abstractmethod
    def residual(self, x: Tensor, update: Tensor) -> SumRelevance:
        """The rule of a residual sum of x and update, (G, T, d)."""

    @abstractmethod
    def norm(self, layer: nn.LayerNorm, x: Tensor, y: Tensor) -> NormRelevance | FactorRelevance:
        """The rule of a layer norm, for its input x and output y (G, T, d)."""

    @abstractmethod
    def part(self, x: Tensor, total: Tensor) -> FactorRelevance:
        """The rule of total = x + constant, (G, T, d), such as position embeddings: the relevance of x."""

    @abstractmethod
    def copies(self, x: Tensor) -> FactorRelevance:
        """The rule of x (G, T, d) that several operators use, for the sum of what each of them gave it."""

    @abstractmethod
    def of_scores(self, scores: Tensor) -> Tensor:
        """Twice the factor of the scores before softmax: from A * (dA - centre) to R_scores / scores."""

    @abstractmethod
    def initial(self, value: Tensor, gradient: Tensor) -> Tensor:
        """The relevance of the detector's outputs, from their values and the target's gradient."""


class PositiveRules(LrpRules):
    """The rules of the published code, with its stabiliser: 1 / (z + 1e-9), and 0 where z is exactly 0.

    Its peculiarities are kept, because they are the method:

    - Linear layers: z = W+ x+ + W- x- has only products that are positive (alpha = 1, beta = 0). What x gets is
      rescaled to the total of R.
    - Residual sums: the two parts are rescaled to |part| / (|part 1| + |part 2|) of the total of R.
    - Position embeddings get nothing; the token gets all. Layer norms pass relevance on unchanged.
    - Where x goes to several operators, the sum of their relevance is multiplied by x / (x + 1e-9).
    - Softmax passes relevance on unchanged, to the scores.
    - The relevance of the target is 1, whatever its value (in general the target's gradient).

    So relevance is kept in total, up to the stabiliser, except that a total of 0 cannot be rescaled.
    """

    centred_softmax = False

    def __init__(self, epsilon: float = 1e-9) -> None:
        super().__init__(epsilon)

    def reciprocal(self, z: Tensor) -> Tensor:
        stabilised = z + self.epsilon
        stabilised = stabilised.masked_fill_(stabilised == 0, self.epsilon or 1.0)
        return stabilised.reciprocal_().masked_fill_(z == 0, 0)

    def linear(self, layer: nn.Linear, x: Tensor, y: Tensor, *, after_relu: bool = False) -> LinearRelevance:
        weight = layer.weight.detach().to(x)
        positive, negative = weight.clamp(min=0), weight.clamp(max=0)
        z = x.clamp(min=0) @ positive.T
        if not after_relu:
            z += x.clamp(max=0) @ negative.T
        return LinearRelevance(
            self, x, self.reciprocal(z), positive, None if after_relu else negative, keep_total=True
        )

    def residual(self, x: Tensor, update: Tensor) -> SumRelevance:
        reciprocal = self.reciprocal(x + update)
        return SumRelevance(self, x * reciprocal, update * reciprocal, balanced=True)

    def norm(self, layer: nn.LayerNorm, x: Tensor, y: Tensor) -> FactorRelevance:
        return FactorRelevance(None)

    def part(self, x: Tensor, total: Tensor) -> FactorRelevance:
        return FactorRelevance(None)

    def copies(self, x: Tensor) -> FactorRelevance:
        return FactorRelevance(x * self.reciprocal(x))

    def of_scores(self, scores: Tensor) -> Tensor:
        return self.reciprocal(scores)

    def initial(self, value: Tensor, gradient: Tensor) -> Tensor:
        return gradient


class EpsilonRules(LrpRules):
    """AttnLRP's rules, with the stabiliser 1 / (z + epsilon * sign(z)), and 0 where z is exactly 0.

    - Linear layers and sums: the epsilon rule. Biases and position embeddings take their share of the relevance.
    - Layer norms: the division by the standard deviation passes relevance on unchanged (identity rule, proposition
      3.4); what is left is linear and has the epsilon rule, as in the authors' code.
    - Softmax a = softmax(s): R_s = s * (R_a - a * sum of R_a), deep Taylor decomposition, whose bias takes the rest.
    - The relevance of the target is its value (in general the detector's outputs times the target's gradient).

    All rules are linear in R. Up to epsilon they are gradient x input, with the gradients of both factors of a product
    halved, and standard deviations as constants.
    """

    centred_softmax = True

    def __init__(self, epsilon: float = 1e-6) -> None:
        super().__init__(epsilon)

    def reciprocal(self, z: Tensor) -> Tensor:
        return (z + torch.where(z < 0, -self.epsilon, self.epsilon)).reciprocal_().masked_fill_(z == 0, 0)

    def linear(self, layer: nn.Linear, x: Tensor, y: Tensor, *, after_relu: bool = False) -> LinearRelevance:
        return LinearRelevance(self, x, self.reciprocal(y), layer.weight.detach().to(x))

    def residual(self, x: Tensor, update: Tensor) -> SumRelevance:
        reciprocal = self.reciprocal(x + update)
        return SumRelevance(self, x * reciprocal, update * reciprocal, balanced=False)

    def norm(self, layer: nn.LayerNorm, x: Tensor, y: Tensor) -> NormRelevance:
        variance = torch.var(x, dim=-1, correction=0, keepdim=True)
        weight = layer.weight.detach().to(x) * (variance + layer.eps).rsqrt_()
        return NormRelevance(x, self.reciprocal(y), weight)

    def part(self, x: Tensor, total: Tensor) -> FactorRelevance:
        return FactorRelevance(x * self.reciprocal(total))

    def copies(self, x: Tensor) -> FactorRelevance:
        return FactorRelevance(None)

    def of_scores(self, scores: Tensor) -> Tensor:
        return scores * self.reciprocal(scores)

    def initial(self, value: Tensor, gradient: Tensor) -> Tensor:
        return value * gradient


def joined(copies: FactorRelevance, relevances: Sequence[Tensor], runs: Tensor) -> Tensor:
    """The relevance of a tensor that several operators use, from what each of them gave it."""
    total = relevances[0]
    for relevance in relevances[1:]:
        total = total + relevance
    return copies(total, runs)
