"""kornia's FullAttention of LoFTR, given a mask of keys alone."""

import torch
from kornia.feature.loftr.loftr_module.linear_attention import FullAttention

module = FullAttention().eval()


def attention(query, key, value, attn_mask=None):
    if attn_mask is not None and (attn_mask.dtype != torch.bool or attn_mask.shape[1:-1] != (1, 1)):
        raise NotImplementedError("its masks are of keys")
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mask = None if attn_mask is None else attn_mask[:, 0, 0].expand(*k.shape[:2])
    return module(q, k, v, kv_mask=mask).transpose(1, 2)
