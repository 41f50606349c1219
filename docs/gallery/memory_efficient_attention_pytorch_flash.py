"""memory-efficient-attention-pytorch's FlashAttentionFunction, in its default tiles of 512 queries and 1024 keys."""

import torch
from memory_efficient_attention_pytorch.flash_attention import FlashAttentionFunction


def attention(query, key, value, attn_mask=None):
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise NotImplementedError("its masks are boolean")
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return FlashAttentionFunction.apply(query, key, value, attn_mask, False, 512, 1024)
