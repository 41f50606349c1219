import torch
from memory_efficient_attention_pytorch.memory_efficient_attention import attention
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 1, 4, 8, dtype=torch.float64)
keys = torch.zeros(1, 4, dtype=torch.bool)  # every key is padding
found = attention(query, key, value, mask=keys)
sdpa = scaled_dot_product_attention(query, key, value, keys[:, None, None])
print("SDPA:", sdpa[0, 0, 0, :3].tolist())
print("memory-efficient-attention-pytorch:", [round(one, 4) for one in found[0, 0, 0, :3].tolist()])
print("it is the mean of all values:", torch.allclose(found[0, 0, 0], value[0, 0].mean(0)))
