"""The rules of relevance as in the paper, with dense matrices: the oracle of this package.

Chefer, Gur, Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
Transformers" (ICCV 2021, arXiv 2103.15679); equation numbers are that paper's. All matrices are computed, also the
N x N ones. This code is for reading, and for comparison in float64; `headoff.relevance.engine` is the fast one.
Shapes: H heads, Q object queries, N image tokens, L decoder layers.

There are two differences from the paper's published code:

- Where a row of R - I sums to zero, equation 9 is 0/0. Here the normalised row is then the identity row: a token
  that has received no relevance from others represents itself. The published code computes NaN, and then clears the
  *whole layer's* contribution; `zero_rows="reference"` does the same, for comparison.
- R - I is computed, not R. Its entries are as small as gradients; adding 1 and subtracting it again would lose most
  of their digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ZeroRows = Literal["identity", "reference"]


@dataclass(frozen=True)
class AttentionEvidence:
    """The evidence in one attention call.

    Attributes:
        weights: (H, Q, S), after softmax and gate.
        gradient: (H, Q, S), of the target with respect to the weights; dA = dO V^T.
        scale: (H, Q, 1), the norm of dO's row times the largest norm of a row of V. Rounding errors of dA are a few
            epsilons of the dtype times this.
    """

    weights: Tensor
    gradient: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Evidence:
    """The evidence in all attention calls of one forward pass, for one target.

    Attributes:
        encoder: (H, N, N) per encoder layer; none if relevance ends at the memory.
        decoder_self: (H, Q, Q) per decoder layer.
        decoder_cross: (H, Q, N) per decoder layer.
        tokens: (N,) bool, True = image, False = padding.
    """

    encoder: tuple[AttentionEvidence, ...]
    decoder_self: tuple[AttentionEvidence, ...]
    decoder_cross: tuple[AttentionEvidence, ...]
    tokens: Tensor


@dataclass(frozen=True)
class DenseRelevance:
    """The result of a dense method.

    Attributes:
        relevance: (L, Q, N), R_qi after every decoder layer.
        decoder_identity_rows: (L,) int64, the number of rows of R_qq - I that sum to zero at that layer.
        encoder_identity_rows: the number of rows of R_ii - I that sum to zero, without padding.
    """

    relevance: Tensor
    decoder_identity_rows: Tensor
    encoder_identity_rows: int


CENTRED_RESOLUTION = 16
"""`centred_cam` takes differences below this many epsilons times `AttentionEvidence.scale` for rounding errors."""

Cam = Callable[[AttentionEvidence], Tensor]


def gradient_cam(evidence: AttentionEvidence) -> Tensor:
    """Equation 5: the mean over all heads of relu(gradient * weights), (Q, S)."""
    return (evidence.gradient * evidence.weights).clamp(min=0).mean(0)


def centred_cam(evidence: AttentionEvidence) -> Tensor:
    """Equation 5 with the gradient minus its weighted mean over a row; the weights of the mean are those of attention.

    Up to a factor, that is the gradient with respect to the scores before softmax, which cannot change all weights of a
    row alike. Attention over equal values gets no relevance: differences of the size of rounding errors are set to
    exactly zero, because equation 9 would normalise them to the same total as real relevance.
    """
    weights, gradient = evidence.weights, evidence.gradient
    gate = weights.sum(-1, keepdim=True)
    mean = (weights * gradient).sum(-1, keepdim=True) / torch.where(gate == 0, 1, gate)
    centred = gradient - mean
    centred = centred.masked_fill(
        centred.abs() <= CENTRED_RESOLUTION * torch.finfo(centred.dtype).eps * evidence.scale, 0
    )
    return (weights * centred).clamp(min=0).mean(0)


def attention_cam(evidence: AttentionEvidence) -> Tensor:
    """The mean of the weights over all heads, (Q, S), without a gradient."""
    return evidence.weights.mean(0)


def encoder_excess(cams: list[Tensor]) -> Tensor:
    """R_ii - I (N, N) from the cams of all encoder layers, by equation 6: R_ii <- R_ii + cam R_ii, beginning with I."""
    excess = torch.zeros_like(cams[0])
    for cam in cams:
        excess = excess + cam + cam @ excess
    return excess


def normalise(excess: Tensor) -> Tensor:
    """Equations 8 and 9: rows of R - I divided by their sums, plus I; a row that sums to 0 becomes that of I."""
    sums = excess.sum(-1, keepdim=True)
    return excess / torch.where(sums == 0, 1, sums) + _identity(len(excess), excess)


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def zero_row_count(excess: Tensor) -> int:
    """How many rows of R - I sum to zero."""
    return int((excess.sum(-1) == 0).sum())


def chefer(
    evidence: Evidence,
    *,
    cam: Cam = gradient_cam,
    normalised: bool = True,
    self_in_rule_10: bool = True,
    zero_rows: ZeroRows = "identity",
) -> DenseRelevance:
    """Equations 5 to 11.

    Args:
        cam: equation 5, or a replacement.
        normalised: False leaves out equations 8 and 9 (an ablation in the paper).
        self_in_rule_10: False adds the cam alone in equation 10 (an ablation in the paper).
        zero_rows: see the docstring of this module.
    """
    if evidence.encoder:
        encoder = encoder_excess([cam(layer) for layer in evidence.encoder])
    else:  # relevance ends at the memory
        tokens = len(evidence.tokens)
        encoder = evidence.decoder_cross[0].weights.new_zeros(tokens, tokens)
    identity = _identity(len(encoder), encoder)
    r_ii = normalise(encoder) if normalised else encoder + identity
    # Padding is left out: no token attends to it, and its rows are always zero.
    encoder_zeros = zero_row_count(encoder[evidence.tokens]) if evidence.encoder else 0

    queries = evidence.decoder_self[0].weights.shape[-1]
    r_qq_excess = encoder.new_zeros(queries, queries)
    r_qi = encoder.new_zeros(queries, len(encoder))
    after, zeros = [], []
    for self_evidence, cross_evidence in zip(evidence.decoder_self, evidence.decoder_cross, strict=True):
        self_cam, cross_cam = cam(self_evidence), cam(cross_evidence)
        r_qi = r_qi + self_cam @ r_qi  # equation 7
        r_qq_excess = r_qq_excess + self_cam + self_cam @ r_qq_excess  # equation 6
        zeros.append(zero_row_count(r_qq_excess))
        if not self_in_rule_10:
            r_qi = r_qi + cross_cam
        elif zero_rows == "identity" or not normalised or zeros[-1] + encoder_zeros == 0:
            r_qq = normalise(r_qq_excess) if normalised else r_qq_excess + _identity(queries, encoder)
            r_qi = r_qi + r_qq.T @ cross_cam @ r_ii  # equation 10
        after.append(r_qi)
    return DenseRelevance(torch.stack(after), torch.tensor(zeros), encoder_zeros)


def no_aggregation(evidence: Evidence) -> DenseRelevance:
    """The paper's ablation without aggregation: every layer's update replaces the relevance."""
    r_ii = _identity(len(evidence.tokens), evidence.decoder_cross[0].weights)
    for layer in evidence.encoder:
        r_ii = gradient_cam(layer) @ r_ii
    r_qq = _identity(evidence.decoder_self[0].weights.shape[-1], r_ii)
    after = []
    for self_evidence, cross_evidence in zip(evidence.decoder_self, evidence.decoder_cross, strict=True):
        r_qq = gradient_cam(self_evidence) @ r_qq
        after.append(r_qq.T @ gradient_cam(cross_evidence) @ r_ii)
    return _unnormalised(after)


def raw(evidence: Evidence) -> DenseRelevance:
    """The cross-attention of each decoder layer, as the mean over its heads."""
    return _unnormalised([attention_cam(layer) for layer in evidence.decoder_cross])


def rollout(evidence: Evidence) -> DenseRelevance:
    """Attention rollout (Abnar, Zuidema, arXiv 2005.00928) of both self-attentions around the cross-attention.

    R is the product over layers of (mean weights + I) with rows normalised to 1; equation 10 combines both R.
    """

    def step(cam: Tensor) -> Tensor:
        residual = cam + _identity(len(cam), cam)
        return residual / residual.sum(-1, keepdim=True)

    r_ii = _identity(len(evidence.tokens), evidence.decoder_cross[0].weights)
    for layer in evidence.encoder:
        r_ii = step(attention_cam(layer)) @ r_ii
    r_qq = _identity(evidence.decoder_self[0].weights.shape[-1], r_ii)
    after = []
    for self_evidence, cross_evidence in zip(evidence.decoder_self, evidence.decoder_cross, strict=True):
        r_qq = step(attention_cam(self_evidence)) @ r_qq
        after.append(r_qq.T @ attention_cam(cross_evidence) @ r_ii)
    return _unnormalised(after)


def attention_gradcam(evidence: Evidence) -> DenseRelevance:
    """Grad-CAM (Selvaraju et al., arXiv 1610.02391) of each layer's cross-attention.

    Heads are weighted by their mean gradient over all queries and image tokens; the map is relu of the mean over heads.
    """

    def cam(layer: AttentionEvidence) -> Tensor:
        importance = layer.gradient[..., evidence.tokens].mean((1, 2), keepdim=True)
        return (layer.weights * importance).mean(0).clamp(min=0)

    return _unnormalised([cam(layer) for layer in evidence.decoder_cross])


def _unnormalised(after: list[Tensor]) -> DenseRelevance:
    return DenseRelevance(torch.stack(after), torch.zeros(len(after), dtype=torch.long), 0)
