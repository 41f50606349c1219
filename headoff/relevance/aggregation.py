"""Equations 6 to 11 for single rows, by products of cams with vectors, without products of two N x N matrices.

Only one row of R_qi per target and decoder layer is needed. Let E_l, D_m, X_m be the cams of encoder layer l, decoder
self-attention m and cross-attention m, and t the target's query.

- Decoder: by equations 7 and 10, row t after layer M is the sum over m <= M of (Rbar_m p_m)^T X_m Rbar_ii, with
  p_M = e_t and p_m = p_(m+1) (I + D_(m+1)). The decoder functions compute the sums without the factor Rbar_ii.
- Encoder: row sums of R_ii - I by products from the right, s <- s + E_l (1 + s) for l = 1 ... L; rows times R_ii by
  products from the left, y <- y + y E_l for l = L ... 1.

Shapes: P pairs, M decoder layers, Q queries, N tokens. All in the dtype of the cams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headoff.relevance.encoder_cams import EncoderCams
from headoff.relevance.rules import ZeroRows


@dataclass(frozen=True)
class DecoderCams:
    """The decoder's cams.

    Attributes:
        self_attention: D_m (P, Q, Q) per layer.
        cross_attention: X_m (P, Q, N) per layer.
        queries: (P,) int64, the target's query t.
    """

    self_attention: Sequence[Tensor]
    cross_attention: Sequence[Tensor]
    queries: Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of the relevance, and how many rows summed to zero and were normalised to identity rows.

    Attributes:
        rows: (P, M, N).
        decoder_identity_rows: (P, M) int64.
        encoder_identity_rows: (P,) int64.
    """

    rows: Tensor
    decoder_identity_rows: Tensor
    encoder_identity_rows: Tensor

    def select(self, pairs: slice) -> Rows:
        """The rows of a slice of pairs."""
        return Rows(self.rows[pairs], self.decoder_identity_rows[pairs], self.encoder_identity_rows[pairs])


def _without_normalisation(rows: Tensor) -> Rows:
    pairs, layers, _ = rows.shape
    zeros = torch.zeros(pairs, layers, dtype=torch.long, device=rows.device)
    return Rows(rows, zeros, zeros[:, 0])


def _divide_by_sums(excess: Tensor, sums: Tensor) -> Tensor:
    """Equations 8 and 9 without adding I: rows divided by their sums, zero where the sum is zero."""
    return excess / sums.masked_fill(sums == 0, 1)


def _unit_rows(cams: DecoderCams) -> Tensor:
    """The unit vectors e_t, (P, Q)."""
    places = torch.arange(cams.self_attention[0].shape[-1], device=cams.queries.device)
    return (cams.queries[:, None] == places).to(cams.self_attention[0])


def chefer_decoder(
    cams: DecoderCams,
    *,
    normalised: bool = True,
    self_in_rule_10: bool = True,
    zero_rows: ZeroRows = "identity",
) -> Rows:
    """The decoder's part of equations 6 to 11, for every layer: rows without the factor Rbar_ii."""
    excess: list[Tensor] = []
    for cam in cams.self_attention:
        excess.append(cam if not excess else excess[-1] + cam + cam @ excess[-1])
    sums = [matrix.sum(-1, keepdim=True) for matrix in excess]
    identity_rows = torch.stack([(row_sums == 0).sum((1, 2)) for row_sums in sums], dim=1)

    layers, tokens = len(cams.self_attention), cams.cross_attention[0].shape[-1]
    unit = _unit_rows(cams)
    rows = unit.new_zeros(len(unit), layers, tokens)
    path = unit.new_empty(len(unit), 0, unit.shape[1])  # p_m for the maps after layers m, ..., M
    for layer in reversed(range(layers)):
        if path.shape[1]:
            path = path + path @ cams.self_attention[layer + 1]
        path = torch.cat((unit[:, None], path), dim=1)
        through = path
        if self_in_rule_10:
            r_qq = _divide_by_sums(excess[layer], sums[layer]) if normalised else excess[layer]
            through = path + path @ r_qq.transpose(1, 2)
        update = through @ cams.cross_attention[layer]
        if zero_rows == "reference" and normalised and self_in_rule_10:
            update = update.masked_fill((identity_rows[:, layer] > 0)[:, None, None], 0)
        rows[:, layer:] += update
    if not (normalised and self_in_rule_10):
        return _without_normalisation(rows)
    return Rows(rows, identity_rows, identity_rows.new_zeros(len(unit)))


def chefer_encoder(
    decoder_rows: Rows,
    encoder: EncoderCams,
    tokens: Tensor | None,
    *,
    normalised: bool = True,
    zero_rows: ZeroRows = "identity",
) -> Rows:
    """Rows times the factor Rbar_ii; `tokens` (N,) bool, True = image, False = padding; None without padding."""
    rows, weights, zeros = decoder_rows.rows, decoder_rows.rows, decoder_rows.encoder_identity_rows
    if normalised:
        sums = rows.new_zeros(len(rows), rows.shape[-1])
        for layer in range(len(encoder)):
            sums = sums + encoder.right(layer, 1 + sums)
        zero = sums == 0
        zeros = (zero if tokens is None else zero & tokens).sum(-1)
        weights = torch.where(zero[:, None], 0, _divide_by_sums(rows, sums[:, None]))
    update = torch.zeros_like(rows)
    for layer in reversed(range(len(encoder))):
        update = update + encoder.left(layer, weights + update)
    rows = rows + update
    if zero_rows == "reference" and normalised:
        rows = rows.masked_fill((zeros > 0)[:, None, None], 0)
    return Rows(rows, decoder_rows.decoder_identity_rows, zeros)


def no_aggregation_decoder(cams: DecoderCams, *, residual: bool = False) -> Rows:
    """Column t of D_m ... D_1, times X_m; with `residual` (rollout), D + I with normalised rows instead of D."""
    column = _unit_rows(cams)[:, :, None]
    rows = []
    for cam, cross in zip(cams.self_attention, cams.cross_attention, strict=True):
        after = cam @ column
        column = (after + column) / (1 + cam.sum(-1, keepdim=True)) if residual else after
        rows.append(column.transpose(1, 2) @ cross)
    return _without_normalisation(torch.cat(rows, dim=1))


def no_aggregation_encoder(
    decoder_rows: Rows, encoder: EncoderCams, tokens: Tensor | None, *, residual: bool = False
) -> Rows:
    """Rows times E_L ... E_1; with `residual` (rollout), E + I with normalised rows instead of E."""
    rows = decoder_rows.rows
    for layer in reversed(range(len(encoder))):
        if residual:
            sums = 1 + encoder.right(layer, rows.new_ones(len(rows), rows.shape[-1]))
            rows = rows / sums[:, None]
            rows = rows + encoder.left(layer, rows)
        else:
            rows = encoder.left(layer, rows)
    return Rows(rows, decoder_rows.decoder_identity_rows, decoder_rows.encoder_identity_rows)


def cross_only(cams: DecoderCams) -> Rows:
    """Row t of X_m."""
    index = cams.queries[:, None, None]
    return _without_normalisation(
        torch.cat(
            [cross.gather(1, index.expand(-1, 1, cross.shape[-1])) for cross in cams.cross_attention], dim=1
        )
    )
