"""ring-attention-pytorch's ring_flash_attn on one machine."""

import torch
from ring_attention_pytorch.ring_flash_attention import ring_flash_attn


def attention(query, key, value, attn_mask=None):
    if attn_mask is not None and (attn_mask.dtype != torch.bool or attn_mask.shape[1:-1] != (1, 1)):
        raise NotImplementedError("its masks are of keys")
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mask = None if attn_mask is None else attn_mask[:, 0, 0].expand(*k.shape[:2])
    return ring_flash_attn(q, k, v, mask, bucket_size=64).transpose(1, 2)
