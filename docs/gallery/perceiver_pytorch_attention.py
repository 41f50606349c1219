"""perceiver-pytorch's Attention, a tutorial's einops style; projections are identities."""

import functools

import torch
from perceiver_pytorch.perceiver_pytorch import Attention


@functools.cache
def module_of(heads, channels):
    with torch.device("meta"):  # its projections are dropped: draw no random numbers for them
        module = Attention(heads * channels, heads=heads, dim_head=channels).eval()
    module.to_q = module.to_kv = module.to_out = torch.nn.Identity()
    return module


def attention(query, key, value, attn_mask=None):
    if attn_mask is not None and (attn_mask.dtype != torch.bool or attn_mask.shape[1:-1] != (1, 1)):
        raise NotImplementedError("its masks are of keys")
    heads, channels = query.shape[1], query.shape[3]
    q, k, v = (tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value))
    mask = None if attn_mask is None else attn_mask[:, 0, 0].expand(query.shape[0], key.shape[2])
    context = module_of(heads, channels)(q, torch.cat([k, v], -1), mask)
    return context.unflatten(-1, (heads, channels)).transpose(1, 2)
