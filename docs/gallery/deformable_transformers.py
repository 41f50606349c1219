"""transformers' MultiScaleDeformableAttention of Deformable DETR."""

from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

module = MultiScaleDeformableAttention()


def kernel(value, spatial_shapes, sampling_locations, attention_weights):
    context = module(value, None, spatial_shapes, None, sampling_locations, attention_weights, 64)
    return context.unflatten(-1, value.shape[2:])
