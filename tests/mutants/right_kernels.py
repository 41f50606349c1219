"""Right attentions written out as kernels are: tiles with bounds, sums by hand, and backward passes step by step.

Autograd differentiates nothing here but `without_products`. So their forward and their backward passes can be mutated
line by line (`mutation.operators`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mutants.registry import right


@right(
    "kernel",
    "tiles of queries and keys in powers of 2, the last ones filled up; one backward pass by key tile",
)
def tiled():
    return Tiled.attention


class Tiled(torch.autograd.Function):
    """As Triton's tutorial on fused attention has it, with a mask and a gate."""

    ROWS, COLUMNS = 16, 32
    """Queries and keys in a tile."""

    @classmethod
    def attention(cls, query, key, value, attn_mask=None, *, head_gate=None):
        compute = torch.promote_types(query.dtype, torch.float32)
        bias = None
        if attn_mask is not None:
            bias = attn_mask
            if attn_mask.dtype == torch.bool:
                bias = torch.zeros(attn_mask.shape, dtype=compute, device=query.device)
                bias = bias.masked_fill(~attn_mask, -math.inf)
            bias = bias.detach().to(compute).expand(*query.shape[:3], key.shape[2])
        gate = None if head_gate is None else head_gate.detach().to(compute).expand(*query.shape[:3], 1)
        return cls.apply(query, key, value, bias, gate, compute)

    @staticmethod
    def tile(tensor: Tensor, start: int, size: int, compute: torch.dtype) -> Tensor:
        """Rows from `start` on, zeros where there are no more."""
        rows = tensor[:, :, start : min(start + size, tensor.shape[2])].to(compute)
        return torch.nn.functional.pad(rows, (0, 0, 0, size - rows.shape[2]))

    @staticmethod
    def scores(ctx, q: Tensor, k: Tensor, row: int, column: int) -> Tensor:
        """Of one tile, in powers of 2; -inf where there is no key."""
        scores = q @ k.mT * (ctx.scale * math.log2(math.e))
        if ctx.bias is not None:
            part = ctx.bias[:, :, row : row + Tiled.ROWS, column : column + Tiled.COLUMNS]
            missing = (0, Tiled.COLUMNS - part.shape[3], 0, Tiled.ROWS - part.shape[2])
            scores = scores + torch.nn.functional.pad(part, missing) * math.log2(math.e)
        columns = column + torch.arange(Tiled.COLUMNS, device=q.device)
        return scores.masked_fill(columns >= ctx.keys, -math.inf)

    @staticmethod
    def forward(ctx, query, key, value, bias, gate, compute):
        ctx.bias, ctx.gate, ctx.compute = bias, gate, compute
        ctx.scale, ctx.keys = query.shape[3] ** -0.5, key.shape[2]
        result = torch.empty_like(query, memory_format=torch.contiguous_format)
        log_sums = torch.empty(query.shape[:3], dtype=compute, device=query.device)
        for row in range(0, query.shape[2], Tiled.ROWS):
            q = Tiled.tile(query, row, Tiled.ROWS, compute)
            most = torch.full_like(q[..., :1], -math.inf)
            total = torch.zeros_like(most)
            accumulated = torch.zeros_like(q)
            for column in range(0, key.shape[2], Tiled.COLUMNS):
                scores = Tiled.scores(ctx, q, Tiled.tile(key, column, Tiled.COLUMNS, compute), row, column)
                largest = torch.maximum(most, scores.amax(-1, keepdim=True))
                safe = largest.masked_fill(largest == -math.inf, 0.0)
                terms = torch.exp2(scores - safe)
                factor = torch.exp2(most - safe)
                total = total * factor + terms.sum(-1, keepdim=True)
                accumulated = accumulated * factor + terms @ Tiled.tile(value, column, Tiled.COLUMNS, compute)
                most = largest
            is_empty = total == 0
            accumulated = accumulated / total.masked_fill(is_empty, 1.0)
            log_sum = (most + total.log2()).masked_fill(is_empty, math.inf)
            end = min(row + Tiled.ROWS, query.shape[2])
            if gate is not None:
                accumulated[:, :, : end - row] *= gate[:, :, row:end]
            result[:, :, row:end] = accumulated[:, :, : end - row].to(query.dtype)
            log_sums[:, :, row:end] = log_sum[:, :, : end - row, 0]
        ctx.save_for_backward(query, key, value, result, log_sums)
        return result

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, result, log_sums = ctx.saved_tensors
        compute = ctx.compute
        raw = grad_output.to(compute)
        deltas = (raw * result.to(compute)).sum(-1, keepdim=True)
        gradient = raw if ctx.gate is None else raw * ctx.gate
        dq = torch.zeros(query.shape, dtype=compute, device=query.device)
        dk = torch.zeros(key.shape, dtype=compute, device=key.device)
        dv = torch.zeros(value.shape, dtype=compute, device=value.device)
        for column in range(0, key.shape[2], Tiled.COLUMNS):
            k = Tiled.tile(key, column, Tiled.COLUMNS, compute)
            v = Tiled.tile(value, column, Tiled.COLUMNS, compute)
            dk_tile, dv_tile = torch.zeros_like(k), torch.zeros_like(v)
            for row in range(0, query.shape[2], Tiled.ROWS):
                end = min(row + Tiled.ROWS, query.shape[2])
                q = Tiled.tile(query, row, Tiled.ROWS, compute)
                do = Tiled.tile(gradient, row, Tiled.ROWS, compute)
                delta = Tiled.tile(deltas, row, Tiled.ROWS, compute)
                log_sum = Tiled.tile(log_sums[..., None], row, Tiled.ROWS, compute)
                weights = torch.exp2(Tiled.scores(ctx, q, k, row, column) - log_sum)
                dv_tile += weights.mT @ do
                dscores = weights * (do @ v.mT - delta) * ctx.scale
                dk_tile += dscores.mT @ q
                dq[:, :, row:end] += (dscores @ k)[:, :, : end - row]
            last = min(column + Tiled.COLUMNS, key.shape[2])
            dk[:, :, column:last] = dk_tile[:, :, : last - column]
            dv[:, :, column:last] = dv_tile[:, :, : last - column]
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None, None


@right("kernel", "one head after the other, weights kept for the backward pass, heads that are off left out")
def head_by_head():
    return HeadByHead.attention


class HeadByHead(torch.autograd.Function):
    @classmethod
    def attention(cls, query, key, value, attn_mask=None, *, head_gate=None):
        return cls.apply(query, key, value, attn_mask, head_gate)

    @staticmethod
    def weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """(Q, S) of one head, zero in rows whose keys are all masked."""
        scores = query @ key.T / math.sqrt(query.shape[1])
        if mask is not None and mask.dtype == torch.bool:
            scores[~mask] = -math.inf
        elif mask is not None:
            scores += mask.to(scores.dtype)
        most = scores.max(1, keepdim=True).values
        most[most == -math.inf] = 0.0
        scores = torch.exp(scores - most)
        total = scores.sum(1, keepdim=True)
        total[total == 0] = 1.0
        return scores / total

    @staticmethod
    def forward(ctx, query, key, value, attn_mask, head_gate):
        compute = torch.promote_types(query.dtype, torch.float32)
        batch, heads, queries, _ = query.shape
        mask = None if attn_mask is None else attn_mask.expand(batch, heads, queries, key.shape[2])
        gate = torch.ones((), dtype=compute) if head_gate is None else head_gate.to(compute)
        gate = gate.expand(batch, heads, queries, 1)
        result = torch.zeros(query.shape, dtype=compute, device=query.device)
        kept = {}
        for b in range(batch):
            for h in range(heads):
                if not gate[b, h].any():
                    continue
                part = None if mask is None else mask[b, h]
                weights = HeadByHead.weights(query[b, h].to(compute), key[b, h].to(compute), part)
                result[b, h] = weights @ value[b, h].to(compute) * gate[b, h]
                kept[b, h] = weights
        ctx.save_for_backward(query, key, value)
        ctx.kept, ctx.gate = kept, gate
        return result.to(query.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        scale = 1 / math.sqrt(query.shape[3])
        for (b, h), weights in ctx.kept.items():
            q, k, v = (x[b, h].to(weights.dtype) for x in (query, key, value))
            gradient = grad_output[b, h].to(weights.dtype) * ctx.gate[b, h]
            dv[b, h] = (weights.T @ gradient).to(value.dtype)
            dweights = gradient @ v.T
            dscores = weights * (dweights - (weights * dweights).sum(1, keepdim=True))
            dq[b, h] = (scale * (dscores @ k)).to(query.dtype)
            dk[b, h] = (scale * (dscores.T @ q)).to(key.dtype)
        return dq, dk, dv, None, None


@right(
    "kernel",
    "tokens with all heads side by side in memory, as a projection leaves them; bmm with its derivatives",
)
def packed():
    return Packed.attention


class Packed(torch.autograd.Function):
    @staticmethod
    def pack(tensor: Tensor) -> Tensor:
        """(B, H, T, D) as (B, T, H * D)."""
        return tensor.transpose(1, 2).flatten(2)

    @staticmethod
    def by_head(packed: Tensor, heads: int) -> Tensor:
        """(B, T, H * D) as (B * H, T, D)."""
        batch, tokens, width = packed.shape
        split = packed.view(batch, tokens, heads, width // heads)
        return split.permute(0, 2, 1, 3).reshape(batch * heads, tokens, width // heads)

    @classmethod
    def attention(cls, query, key, value, attn_mask=None, *, head_gate=None):
        batch, heads, queries, channels = query.shape
        keys = key.shape[2]
        compute = torch.promote_types(query.dtype, torch.float32)
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
        bias = torch.zeros((), dtype=compute, device=query.device)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            allowed = attn_mask
        elif attn_mask is not None:
            allowed = attn_mask > -math.inf
            bias = attn_mask.detach().to(compute).masked_fill(~allowed, 0.0)
        allowed = allowed.expand(batch, heads, queries, keys).reshape(batch * heads, queries, keys)
        bias = bias.expand(batch, heads, queries, keys).reshape(batch * heads, queries, keys)
        gate = query.new_ones(()) if head_gate is None else head_gate.detach()
        gate = gate.to(compute).expand(batch, heads, queries, 1).reshape(batch * heads, queries, 1)
        inputs = (cls.pack(x).to(compute) for x in (query, key, value))
        result = cls.apply(*inputs, allowed, bias, gate, heads)
        return result.view(batch, queries, heads, channels).transpose(1, 2).to(query.dtype)

    @staticmethod
    def forward(ctx, query, key, value, allowed, bias, gate, heads):
        q, k, v = (Packed.by_head(x, heads) for x in (query, key, value))
        scale = q.shape[2] ** -0.5
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
        scores = torch.where(allowed, scores, -math.inf)
        most = scores.amax(2, keepdim=True).nan_to_num(neginf=0.0)
        terms = (scores - most).exp_()
        weights = terms / terms.sum(2, keepdim=True).clamp(min=torch.finfo(terms.dtype).tiny)
        ctx.save_for_backward(q, k, v, weights, gate)
        ctx.heads, ctx.scale = heads, scale
        result = torch.bmm(weights, v).mul_(gate)
        return Packed.pack(result.unflatten(0, (-1, heads)))

    @staticmethod
    def backward(ctx, grad_output):
        q, k, v, weights, gate = ctx.saved_tensors
        gradient = Packed.by_head(grad_output, ctx.heads) * gate
        dv = torch.bmm(weights.transpose(1, 2), gradient)
        dweights = torch.bmm(gradient, v.transpose(1, 2))
        dscores = dweights.mul_(weights)
        dscores = dscores.sub_(weights * dscores.sum(2, keepdim=True)).mul_(ctx.scale)
        dq = torch.bmm(dscores, k)
        dk = torch.bmm(dscores.transpose(1, 2), q)
        gradients = (Packed.pack(x.unflatten(0, (-1, ctx.heads))) for x in (dq, dk, dv))
        return *gradients, None, None, None, None


@right("kernel", "no matrix product: broadcast products and sums over channels and over keys")
def without_products():
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        compute = torch.promote_types(query.dtype, torch.float32)
        q = query.to(compute)[:, :, :, None, :]
        k = key.to(compute)[:, :, None, :, :]
        v = value.to(compute)[:, :, None, :, :]
        total: Tensor | float = 0.0
        result: Tensor | float = 0.0
        scores = (q * k).sum(4) / math.sqrt(q.shape[4])
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = torch.where(attn_mask, scores, -math.inf)
            else:
                scores = scores + attn_mask.to(compute)
        most = scores.detach().amax(3, keepdim=True)
        most = torch.where(most > -math.inf, most, 0.0)
        for start in range(0, key.shape[2], 64):
            end = min(start + 64, key.shape[2])
            terms = torch.exp(scores[:, :, :, start:end] - most)
            total = total + terms.sum(3)[..., None]
            result = result + (terms[..., None] * v[:, :, :, start:end]).sum(3)
        result = result / torch.where(total > 0, total, 1.0)
        if head_gate is not None:
            result = result * head_gate.to(compute)
        return result.to(query.dtype)

    return attention
