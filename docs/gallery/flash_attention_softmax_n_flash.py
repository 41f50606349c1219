"""flash-attention-softmax-n's flash_attention_n with n = 0, which is the usual softmax."""

import torch
from flash_attention_softmax_n import flash_attention_n


def attention(query, key, value, attn_mask=None):
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return flash_attention_n(query, key, value, softmax_n_param=0, attn_mask=attn_mask)
    return flash_attention_n(query, key, value, softmax_n_param=0, attn_bias=attn_mask)
