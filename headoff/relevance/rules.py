"""The rules of relevance as the paper writes them, on dense matrices: the oracle's half of this package.

Chefer, Gur, Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
Transformers" (ICCV 2021, arXiv 2103.15679); equation numbers are that paper's. Every matrix is really there,
N x N ones included: this is to be read and to be measured against, in float64; `headoff.relevance.engine` is what
to run. Letters: H heads, Q object queries, N image tokens, L decoder layers.

Two things are done otherwise than in the paper's published code, and both are written down here only:

- Where a row of R - I sums to zero, equation 9 is 0/0. Here the normalised row is then the identity row: a token
  that has gathered nothing from others stands for itself. The published code lets the NaN spread and then clears the
  *whole layer's* contribution; `zero_rows="reference"` does that, for comparison.
- R - I is carried, not R. The entries of R - I are as small as gradients are, and adding 1 to them only to
  subtract it again would leave few of their digits.
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
    """One attention call.

    - `weights` (H, Q, S): after softmax and gate
    - `gradient` (H, Q, S): of the target, with respect to them; dA = dO V^T
    - `scale` (H, Q, 1): norm of dO's row times the largest norm of V's: rounding errors of dA are a few times the
      dtype's epsilon of this
    """

    weights: Tensor
    gradient: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Evidence:
    """All attention calls of one forward pass, with the gradients of one target.

    - `encoder`: (H, N, N) per encoder layer
    - `decoder_self`: (H, Q, Q), and `decoder_cross`: (H, Q, N), per decoder layer
    - `tokens` (N,) bool: True = image, False = padding
    """

    encoder: tuple[AttentionEvidence, ...]
    decoder_self: tuple[AttentionEvidence, ...]
    decoder_cross: tuple[AttentionEvidence, ...]
    tokens: Tensor


@dataclass(frozen=True)
class DenseRelevance:
    """What a dense method finds.

    - `relevance` (L, Q, N): R_qi after every decoder layer
    - `decoder_identity_rows` (L,) int64: rows of R_qq - I that sum to zero at that layer
    - `encoder_identity_rows`: rows of R_ii - I that sum to zero, padding left out
    """

    relevance: Tensor
    decoder_identity_rows: Tensor
    encoder_identity_rows: int


CENTRED_RESOLUTION = 16
"""Differences below this many epsilons of `AttentionEvidence.scale` are rounding, and zero to `centred_cam`."""

Cam = Callable[[AttentionEvidence], Tensor]


def gradient_cam(evidence: AttentionEvidence) -> Tensor:
    """Equation 5: the mean over all heads of relu(gradient * weights), (Q, S)."""
    return (evidence.gradient * evidence.weights).clamp(min=0).mean(0)


def centred_cam(evidence: AttentionEvidence) -> Tensor:
    """Equation 5 with the gradient less its mean over a row, weighted by the weights (which sum to the gate).

    That is the gradient with respect to the scores before softmax: raising all weights of a row alike is nothing a
    softmax can do. Attention over values that are all the same gets no relevance at all; and none it is, not rounding
    errors, for equation 9 would make as much of those as of anything.
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
    """The mean of the weights over all heads, (Q, S): no gradient."""
    return evidence.weights.mean(0)


def encoder_excess(cams: list[Tensor]) -> Tensor:
    """R_ii - I (N, N) of the cams of all encoder layers, by equation 6: R_ii <- R_ii + cam R_ii, from I."""
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
        cam: equation 5 or something in its place.
        normalised: False leaves out equations 8 and 9 (an ablation of the paper).
        self_in_rule_10: False puts the cam alone in equation 10's place (another).
        zero_rows: see the head of this module.
    """
    encoder = encoder_excess([cam(each) for each in evidence.encoder])
    identity = _identity(len(encoder), encoder)
    r_ii = normalise(encoder) if normalised else encoder + identity
    # Padding attends but is attended by nobody: its rows are always zero and say nothing.
    encoder_zeros = zero_row_count(encoder[evidence.tokens])

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
    """The paper's ablation without aggregation: every rule overwrites what it would have been added to."""
    r_ii = _identity(len(evidence.tokens), evidence.decoder_cross[0].weights)
    for each in evidence.encoder:
        r_ii = gradient_cam(each) @ r_ii
    r_qq = _identity(evidence.decoder_self[0].weights.shape[-1], r_ii)
    after = []
    for self_evidence, cross_evidence in zip(evidence.decoder_self, evidence.decoder_cross, strict=True):
        r_qq = gradient_cam(self_evidence) @ r_qq
        after.append(r_qq.T @ gradient_cam(cross_evidence) @ r_ii)
    return _unnormalised(after)


def raw(evidence: Evidence) -> DenseRelevance:
    """The cross-attention of each decoder layer, the mean over its heads."""
    return _unnormalised([attention_cam(each) for each in evidence.decoder_cross])


def rollout(evidence: Evidence) -> DenseRelevance:
    """Attention rollout (Abnar, Zuidema, arXiv 2005.00928) of both self-attentions around the cross-attention.

    Each layer's mean weights plus I, rows normalised to 1, multiplied up; equation 10 puts them together.
    """

    def step(cam: Tensor) -> Tensor:
        residual = cam + _identity(len(cam), cam)
        return residual / residual.sum(-1, keepdim=True)

    r_ii = _identity(len(evidence.tokens), evidence.decoder_cross[0].weights)
    for each in evidence.encoder:
        r_ii = step(attention_cam(each)) @ r_ii
    r_qq = _identity(evidence.decoder_self[0].weights.shape[-1], r_ii)
    after = []
    for self_evidence, cross_evidence in zip(evidence.decoder_self, evidence.decoder_cross, strict=True):
        r_qq = step(attention_cam(self_evidence)) @ r_qq
        after.append(r_qq.T @ attention_cam(cross_evidence) @ r_ii)
    return _unnormalised(after)


def attention_gradcam(evidence: Evidence) -> DenseRelevance:
    """Grad-CAM (Selvaraju et al., arXiv 1610.02391) of each layer's cross-attention.

    Heads are weighted by the mean of their gradient over all queries and image tokens, then relu of the mean.
    """

    def cam(each: AttentionEvidence) -> Tensor:
        importance = each.gradient[..., evidence.tokens].mean((1, 2), keepdim=True)
        return (each.weights * importance).mean(0).clamp(min=0)

    return _unnormalised([cam(each) for each in evidence.decoder_cross])


def _unnormalised(after: list[Tensor]) -> DenseRelevance:
    return DenseRelevance(torch.stack(after), torch.zeros(len(after), dtype=torch.long), 0)
