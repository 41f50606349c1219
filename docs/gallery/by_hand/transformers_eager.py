import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.detr.modeling_detr import eager_attention_forward

torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 1, 4, 8, dtype=torch.float64)
lowest = torch.finfo(query.dtype).min
nothing = torch.full((1, 1, 1, 4), lowest, dtype=query.dtype)  # every key is padding
sdpa = scaled_dot_product_attention(query, key, value, torch.zeros(1, 1, 1, 4, dtype=torch.bool))
found, _ = eager_attention_forward(torch.nn.Module().eval(), query, key, value, nothing)
print("largest number of SDPA's context:", sdpa.abs().max().item())
print("largest number of transformers' context:", round(found.abs().max().item(), 4))
print("it is the mean of all values:", torch.allclose(found[0, 0, 0], value[0, 0].mean(0)))
