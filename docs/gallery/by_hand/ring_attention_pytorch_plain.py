import torch
from ring_attention_pytorch.ring_attention import default_attention
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 4, 1, 8, dtype=torch.float64)  # (batch, tokens, heads, channels)
keys = torch.zeros(1, 4, dtype=torch.bool)  # every key is padding
q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
found = default_attention(query, key, value, keys)
print("SDPA:", scaled_dot_product_attention(q, k, v, keys[:, None, None])[0, 0, 0, :3].tolist())
print("ring-attention-pytorch:", [round(one, 4) for one in found[0, 0, 0, :3].tolist()])
print("it is the mean of all values:", torch.allclose(found[0, 0, 0], value[0, :, 0].mean(0)))
