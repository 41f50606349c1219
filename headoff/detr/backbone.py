"""ResNet feature extractor, built from torchvision's residual blocks.

torchvision's `ResNet` class always has a stem of 64 channels and four stages; the small bundled model has fewer of
both. Parameter names are torchvision's (`layer3.0.conv2.weight`), as in the original DETR checkpoints after
`backbone.0.body.`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from headoff.detr.config import BackboneConfig


class ResNet(nn.Module):
    """Pixels (B, 3, H, W) to features (B, `channels`, ceil(H / stride), ceil(W / stride)).

    Args:
        config: sizes.
        norm: makes a normalisation layer for a number of channels: frozen batch norm (running statistics never
            change), or `nn.BatchNorm2d` to train from scratch. Their parameter names are the same.
    """

    def __init__(self, config: BackboneConfig, norm: Callable[[int], nn.Module] = FrozenBatchNorm2d) -> None:
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
        norm: Callable[[int], nn.Module],
    ) -> nn.Sequential:
        out = width * self._block.expansion
        shortcut = None
        if stride != 1 or channels != out:
            shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), norm(out))
        # As in torchvision, the first block of a dilated stage has the dilation of the previous stage.
        blocks = [self._block(channels, width, stride, shortcut, norm_layer=norm)]
        blocks += [self._block(out, width, dilation=dilation, norm_layer=norm) for _ in range(depth - 1)]
        return nn.Sequential(*blocks)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(pixel_values))))
        for stage in range(1, len(self.config.depths) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return x
