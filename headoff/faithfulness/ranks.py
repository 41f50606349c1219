"""Spearman's rank correlation of many pairs of vectors at once."""

from __future__ import annotations

import torch
from torch import Tensor


def centred_ranks(values: Tensor) -> Tensor:
    """The ranks along the last dimension less their mean, float64; equal values have the mean of their ranks."""
    values = values.double().contiguous()
    ordered = values.sort(dim=-1).values.contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to).double() / 2 - values.shape[-1] / 2


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of vectors along the last dimension, whose other dimensions broadcast: (...) float64.

    It is 0 where one of them is constant: that agrees with nothing.
    """
    x, y = centred_ranks(a), centred_ranks(b)
    scale = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return (x * y).sum(-1) / torch.where(scale > 0, scale, torch.inf)
