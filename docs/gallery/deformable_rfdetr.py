"""RF-DETR's ms_deform_attn_core_pytorch."""

from rfdetr.models.ops.functions.ms_deform_attn_func import ms_deform_attn_core_pytorch


def kernel(value, spatial_shapes, sampling_locations, attention_weights):
    columns = value.permute(0, 2, 3, 1).contiguous()  # (B, H, D, N)
    context = ms_deform_attn_core_pytorch(columns, spatial_shapes, sampling_locations, attention_weights)
    return context.unflatten(-1, value.shape[2:])
