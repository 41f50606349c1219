"""kornia's FullAttention of LoFTR."""

import torch
from kornia.feature.loftr.loftr_module.linear_attention import FullAttention

module = FullAttention().eval()


def attention(query, key, value, attn_mask=None):
    if attn_mask is not None and (attn_mask.dtype != torch.bool or attn_mask.shape[1:-1] != (1, 1)):
        raise NotImplementedError("its masks are of keys")
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    masks = ()
    if attn_mask is not None:  # the mask of keys counts only together with one of queries
        masks = (q.new_ones(q.shape[:2], dtype=torch.bool), attn_mask[:, 0, 0].expand(*k.shape[:2]))
    return module(q, k, v, *masks).transpose(1, 2)
