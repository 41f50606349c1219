import torch
from perceiver_pytorch.perceiver_pytorch import Attention
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 4, 8, dtype=torch.float64)
module = Attention(8, heads=1, dim_head=8).eval()
module.to_q = module.to_kv = module.to_out = torch.nn.Identity()
keys = torch.zeros(1, 4, dtype=torch.bool)  # every key is padding
found = module(query, torch.cat([key, value], -1), keys)
print("SDPA:", scaled_dot_product_attention(query, key, value, keys[:, None])[0, 0, :3].tolist())
print("perceiver-pytorch:", [round(one, 4) for one in found[0, 0, :3].tolist()])
print("it is the mean of all values:", torch.allclose(found[0, 0], value[0].mean(0)))
