"""torch's scaled_dot_product_attention with the head gate, under torch.compile with dynamic shapes."""

import torch
from torch.nn.functional import scaled_dot_product_attention


@torch.compile(dynamic=True)
def attention(query, key, value, attn_mask=None, *, head_gate=None):
    context = scaled_dot_product_attention(query, key, value, attn_mask)
    return context if head_gate is None else context * head_gate
