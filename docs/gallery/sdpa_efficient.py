"""torch's scaled_dot_product_attention, the memory-efficient backend of a GPU."""

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def attention(query, key, value, attn_mask=None):
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return scaled_dot_product_attention(query, key, value, attn_mask)
