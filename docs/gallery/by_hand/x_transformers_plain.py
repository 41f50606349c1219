import torch
from torch.nn.functional import scaled_dot_product_attention
from x_transformers.attend import Attend

torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 1, 4, 8, dtype=torch.float64)
nothing = torch.full((1, 1, 4, 4), float("-inf"), dtype=torch.float64)  # an additive mask of every key
print("SDPA:", scaled_dot_product_attention(query, key, value, nothing)[0, 0, 0, :3].tolist())
print("x-transformers:", Attend().eval()(query, key, value, attn_bias=nothing)[0][0, 0, 0, :3].tolist())
