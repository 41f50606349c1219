"""torch's flex_attention, not compiled: forward only on a CPU."""

import torch
from torch.nn.attention.flex_attention import flex_attention


def attention(query, key, value, attn_mask=None):
    if attn_mask is None:
        return flex_attention(query, key, value)
    mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return flex_attention(query, key, value, lambda score, b, h, q, k: score + mask[b, h, q, k])
