"""transformers' flex_attention_forward, which compiles flex_attention."""

import torch
from transformers.integrations.flex_attention import flex_attention_forward

module = torch.nn.Module().eval()


def attention(query, key, value, attn_mask=None):
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return flex_attention_forward(module, query, key, value, attn_mask)[0].transpose(1, 2)
