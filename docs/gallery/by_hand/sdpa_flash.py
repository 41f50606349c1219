import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

query = torch.randn(1, 1, 4, 8, dtype=torch.float64)
value = torch.randn(1, 1, 8, 4, dtype=torch.float64).mT  # channels lie four numbers apart in memory
print("SDPA:", tuple(scaled_dot_product_attention(query, query, value).shape))
with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
    try:
        scaled_dot_product_attention(query, query, value)
    except RuntimeError as error:
        print("its flash backend:", error)
