"""timm's Attention, given queries, keys and values in the place of its projection: of one sequence, as in a ViT."""

import torch
from timm.layers.attention import Attention


def attention(query, key, value, attn_mask=None):
    if query.shape != key.shape:
        raise NotImplementedError("queries and keys are those of one sequence")
    heads, channels = query.shape[1], query.shape[3]
    with torch.device("meta"):  # its projections are dropped
        module = Attention(heads * channels, heads).eval()
    module.qkv = module.proj = torch.nn.Identity()
    packed = torch.stack([query, key, value], 2).permute(0, 3, 2, 1, 4).flatten(2)  # (B, N, 3 H D)
    return module(packed, attn_mask).unflatten(-1, (heads, channels)).transpose(1, 2)
