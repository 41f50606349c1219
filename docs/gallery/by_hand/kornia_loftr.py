import torch
from kornia.feature.loftr.loftr_module.linear_attention import FullAttention
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 4, 1, 8, dtype=torch.float64)  # (batch, tokens, heads, channels)
queries, keys = (
    torch.ones(1, 4, dtype=torch.bool),
    torch.zeros(1, 4, dtype=torch.bool),
)  # all keys are padding
q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
print("SDPA:", scaled_dot_product_attention(q, k, v, keys[:, None, None])[0, 0, 0, :3].tolist())
print("kornia:", FullAttention().eval()(query, key, value, queries, keys)[0, 0, 0, :3].tolist())
