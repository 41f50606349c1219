"""x-transformers' Attend with flash=True."""

import torch
from x_transformers.attend import Attend

attend = Attend(flash=True).eval()


def attention(query, key, value, attn_mask=None):
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return attend(query, key, value, mask=attn_mask)[0]
    return attend(query, key, value, attn_bias=attn_mask)[0]
