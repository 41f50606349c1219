"""transformers' eager_attention_forward of DETR; boolean masks as transformers makes them additive."""

import torch
from transformers.models.detr.modeling_detr import eager_attention_forward

module = torch.nn.Module().eval()


def attention(query, key, value, attn_mask=None):
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, lowest)
    return eager_attention_forward(module, query, key, value, attn_mask)[0].transpose(1, 2)
