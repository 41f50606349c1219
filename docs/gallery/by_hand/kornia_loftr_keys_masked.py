import torch
from kornia.feature.loftr.loftr_module.linear_attention import FullAttention
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 4, 1, 8, dtype=torch.float64)  # (batch, tokens, heads, channels)
keys = torch.tensor([[True, True, True, False]])
q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
sdpa, unmasked = (
    scaled_dot_product_attention(q, k, v, mask).transpose(1, 2) for mask in (keys[:, None, None], None)
)
found = FullAttention().eval()(query, key, value, kv_mask=keys)
print("largest difference from SDPA with the mask:", round((found - sdpa).abs().max().item(), 4))
print("it is SDPA without the mask:", torch.allclose(found, unmasked))
