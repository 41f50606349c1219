"""The fast path of torch.nn.MultiheadAttention (forward only), called directly; projections are identities."""

import torch


def attention(query, key, value, attn_mask=None):
    batch, heads, queries, channels = query.shape
    width, like = heads * channels, {"dtype": query.dtype, "device": query.device}
    q, k, v = (tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value))
    eye = torch.eye(width, **like)
    mask = attn_mask
    if mask is not None:
        if mask.dtype != torch.bool:
            raise NotImplementedError("its masks are boolean")
        mask = ~mask.expand(batch, heads, queries, key.shape[2])
    context, _ = torch._native_multi_head_attention(
        q, k, v, width, heads, eye.repeat(3, 1), torch.zeros(3 * width, **like), eye,
        torch.zeros(width, **like), mask, need_weights=False, mask_type=None if mask is None else 2,
    )  # fmt: skip
    return context.unflatten(-1, (heads, channels)).transpose(1, 2)
