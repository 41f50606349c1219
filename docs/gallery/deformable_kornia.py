"""kornia's deformable attention kernel of RT-DETR."""

from kornia.models.rt_detr.architecture.rtdetr_head import _deformable_attention_kernel


def kernel(value, spatial_shapes, sampling_locations, attention_weights):
    context = _deformable_attention_kernel(value, [*spatial_shapes], sampling_locations, attention_weights)
    return context.unflatten(-1, value.shape[2:])
