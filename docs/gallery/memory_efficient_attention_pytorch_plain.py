"""memory-efficient-attention-pytorch's plain attention."""

import torch
from memory_efficient_attention_pytorch.memory_efficient_attention import attention as plain


def attention(query, key, value, attn_mask=None):
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return plain(query, key, value, mask=attn_mask)
    return plain(query, key, value, attn_bias=attn_mask)
