"""xformers' memory_efficient_attention."""

import math

import torch
from xformers.ops import memory_efficient_attention


def attention(query, key, value, attn_mask=None):
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
    bias = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)
