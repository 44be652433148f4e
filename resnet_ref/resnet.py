"""Residual networks for ImageNet, in the shapes of torchvision's; cifar.py reuses the class.

Papers: ResNet and plain networks, He et al. 2015 (arXiv:1512.03385); pre-activation, He et al. 2016
(arXiv:1603.05027); ResNeXt, Xie et al. 2016 (arXiv:1611.05431); Wide ResNet, Zagoruyko and
Komodakis 2016 (arXiv:1605.07146).
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from resfuse.resnet_ref.blocks import (
    BasicBlock,
    BlockFactory,
    Bottleneck,
    PlainBlock,
    PreActBottleneck,
    Shortcut,
    make_blocks,
)

# Depth -> blocks of each stage; He et al. 2015, table 1. 200 is 152 with 16 more blocks on the
# 28x28 map; He et al. 2016, section 5.
BASIC_COUNTS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
BOTTLENECK_COUNTS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


class ResNet(nn.Module):
    """Stem, stages of blocks that halve the image, global average, one fully connected layer.

    [N, 3, H, W] -> [N, num_classes], or with `features_only` the list of the stages' maps,
    [N, num_chs, H / reduction, W / reduction] each, as `feature_info` lists them (timm's keys).
    The maps of pre-activation networks are sums that no ReLU follows, but for the last one.

    Initialisation is torchvision's (He et al. 2015, arXiv:1502.01852), draw for draw.

    Args:
        block: builds a block from (in_channels, planes, stride).
        counts: blocks in each stage.
        widths: planes of each stage.
        stem_width: channels of the first convolution.
        small_images: a 3x3 stem that keeps the size (CIFAR), not the 7x7 and pooling that quarter
            it.
        preact: the blocks normalise what they read, so BN-ReLU follows the last stage, not the
            stem. The authors' ImageNet code pools after the first BN-ReLU, this one before: the
            same values wherever the scale is positive, on a quarter of the pixels.
        num_classes: outputs of the fully connected layer.
        features_only: return the maps and have no head. With the same seed the weights are those
            of the whole network.
    """

    def __init__(
        self,
        block: BlockFactory,
        counts: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        stem_width: int = 64,
        small_images: bool = False,
        preact: bool = False,
        num_classes: int = 1000,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        self.preact = preact
        self.features_only = features_only
        self.feature_info: list[dict[str, int | str]] = []

        if small_images:
            self.conv1 = nn.Conv2d(3, stem_width, 3, stride=1, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, stem_width, 7, stride=2, padding=3, bias=False)
        if not preact:
            self.bn1 = nn.BatchNorm2d(stem_width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)

        channels, reduction = stem_width, 1 if small_images else 4
        for stage, (planes, count) in enumerate(zip(widths, counts, strict=True), start=1):
            stride = 1 if stage == 1 else 2
            blocks = make_blocks(block, channels, planes, count, stride)
            channels, reduction = blocks[-1].out_channels, reduction * stride
            name = f"layer{stage}"
            self.add_module(name, nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": name})

        if preact:
            self.norm = nn.BatchNorm2d(channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if features_only:
            del self.avgpool, self.fc

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = self.conv1(x)
        if not self.preact:
            x = self.relu(self.bn1(x))
        x = self.maxpool(x)
        maps = []
        for info in self.feature_info:
            x = getattr(self, str(info["module"]))(x)
            if self.features_only:  # else a map would outlive its use and raise the peak memory
                maps.append(x)
        if self.preact:
            x = self.relu(self.norm(x))
        if self.features_only:
            return [*maps[:-1], x]
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet(
    depth: int,
    shortcut: Shortcut = "B",
    stride_in_1x1: bool = False,
    groups: int = 1,
    base_width: int = 64,
    num_classes: int = 1000,
    features_only: bool = False,
) -> ResNet:
    """Builds a ResNet, ResNeXt or Wide ResNet; see Bottleneck for the arguments.

    Raises:
        ValueError: no such depth, or one below 50, which has no bottleneck and so no 1x1 to stride
            in, no groups and no width, with one of those.
    """
    if depth in BASIC_COUNTS:
        if stride_in_1x1 or (groups, base_width) != (1, 64):
            raise ValueError(f"stride_in_1x1, groups, base_width need depth >= 50, not {depth}")
        return ResNet(
            partial(BasicBlock, shortcut=shortcut),
            BASIC_COUNTS[depth],
            num_classes=num_classes,
            features_only=features_only,
        )
    return ResNet(
        partial(
            Bottleneck,
            shortcut=shortcut,
            stride_in_1x1=stride_in_1x1,
            groups=groups,
            base_width=base_width,
        ),
        _counts(depth, BASIC_COUNTS | BOTTLENECK_COUNTS),
        num_classes=num_classes,
        features_only=features_only,
    )


def plain(depth: int, num_classes: int = 1000, features_only: bool = False) -> ResNet:
    """Builds the plain network of 18 or 34 layers; He et al. 2015, figure 3 middle.

    Raises:
        ValueError: another depth.
    """
    counts = _counts(depth, BASIC_COUNTS)
    return ResNet(PlainBlock, counts, num_classes=num_classes, features_only=features_only)


def preact_resnet(depth: int, num_classes: int = 1000, features_only: bool = False) -> ResNet:
    """Builds a pre-activation ResNet that strides in the 3x3, as facebook/fb.resnet.torch does.

    Raises:
        ValueError: no such depth of three-layer blocks.
    """
    return ResNet(
        PreActBottleneck,
        _counts(depth, BOTTLENECK_COUNTS),
        preact=True,
        num_classes=num_classes,
        features_only=features_only,
    )


def _counts(depth: int, known: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    if depth not in known:
        raise ValueError(f"depth is {depth}; accepted: {', '.join(map(str, known))}")
    return known[depth]
