"""transformers' multi_scale_deformable_attention_v2 of RT-DETRv2."""

from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import multi_scale_deformable_attention_v2


def kernel(value, spatial_shapes, sampling_locations, attention_weights):
    points = [sampling_locations.shape[4]] * len(spatial_shapes)
    locations, weights = sampling_locations.flatten(3, 4), attention_weights.flatten(3)
    context = multi_scale_deformable_attention_v2(value, spatial_shapes, locations, weights, points)
    return context.unflatten(-1, value.shape[2:])
