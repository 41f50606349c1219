"""ResNet feature extractor.

Parameter names are torchvision's (`layer3.0.conv2.weight`), as in the original DETR checkpoints after
`backbone.0.body.`, and so are the numbers. torchvision's own class always has a stem of 64 channels and four stages,
where the small bundled model has fewer of both, and importing torchvision takes as long as importing torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from headoff.detr.config import BackboneConfig

Norm = Callable[[int], nn.Module]
"""Makes a normalisation layer for a number of channels."""


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters never change."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (
            buffer.reshape(1, -1, 1, 1)
            for buffer in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (variance + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: object) -> None:
        # A trained batch norm also counts its batches.
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, as in ResNet-18 and 34."""

    expansion = 1

    def __init__(
        self, channels: int, width: int, stride: int, dilation: int, shortcut: nn.Module | None, norm: Norm
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, width, 3, stride, dilation)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _convolution(width, width, 3, dilation=dilation)
        self.bn2 = norm(width)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, as in ResNet-50; the stride is that of the 3x3 convolution."""

    expansion = 4

    def __init__(
        self, channels: int, width: int, stride: int, dilation: int, shortcut: nn.Module | None, norm: Norm
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, width, 1)
        self.bn1 = norm(width)
        self.conv2 = _convolution(width, width, 3, stride, dilation)
        self.bn2 = norm(width)
        self.conv3 = _convolution(width, width * self.expansion, 1)
        self.bn3 = norm(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Pixels (B, 3, H, W) to features (B, `channels`, ceil(H / stride), ceil(W / stride)).

    Args:
        config: sizes.
        norm: makes a normalisation layer for a number of channels: frozen batch norm (running statistics never
            change), or `nn.BatchNorm2d` to train from scratch. Their parameter names are the same.
    """

    def __init__(self, config: BackboneConfig, norm: Norm = FrozenBatchNorm2d) -> None:
        super().__init__()
        self.config = config
        self._block = BasicBlock if config.block == "basic" else Bottleneck
        self.conv1 = nn.Conv2d(3, config.stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(config.stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = config.stem
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True), start=1):
            dilate = config.dilate_last and stage == len(config.depths)
            stride = 1 if stage == 1 or dilate else 2
            self.add_module(
                f"layer{stage}", self._stage(channels, width, depth, stride, 2 if dilate else 1, norm)
            )
            channels = width * self._block.expansion
        self.channels = channels

    def _stage(
        self,
        channels: int,
        width: int,
        depth: int,
        stride: int,
        dilation: int,
        norm: Norm,
    ) -> nn.Sequential:
        out = width * self._block.expansion
        shortcut = None
        if stride != 1 or channels != out:
            shortcut = nn.Sequential(_convolution(channels, out, 1, stride), norm(out))
        # As in torchvision, the first block of a dilated stage has the dilation of the previous stage.
        blocks = [self._block(channels, width, stride, 1, shortcut, norm)]
        blocks += [self._block(out, width, 1, dilation, None, norm) for _ in range(depth - 1)]
        return nn.Sequential(*blocks)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(pixel_values))))
        for stage in range(1, len(self.config.depths) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return x


def _convolution(channels: int, out: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation if size == 3 else 0
    return nn.Conv2d(channels, out, size, stride, padding, dilation, bias=False)
