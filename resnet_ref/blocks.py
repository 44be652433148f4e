"""The blocks of residual networks: post-activation, pre-activation, and plain (no shortcut).

Attribute names (conv1, bn1, ..., downsample.0) are torchvision's, so that checkpoints interchange.
In the shapes below an input is [N, in_channels, H, W] and an output [N, out_channels, P, Q], where
P, Q are H, W over the stride, rounded up.
"""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["A", "B", "C"]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class PaddedIdentity(nn.Module):
    """Shortcut option A: every stride-th pixel, and zeros for the channels that are missing."""

    def __init__(self, stride: int, extra_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra_channels = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, extra_channels={self.extra_channels}"


def make_shortcut(
    option: Shortcut, in_channels: int, out_channels: int, stride: int
) -> nn.Module | None:
    """Builds the shortcut of a post-activation block; None stands for the identity.

    Options of He et al. 2015 (arXiv:1512.03385), section 3.3 and table 3: A pads with zeros and has
    no parameters, B projects where the shape changes, C projects in every block.

    Raises:
        ValueError: `option` is not one of A, B, C.
    """
    if option not in ("A", "B", "C"):
        raise ValueError(f"shortcut is {option!r}; accepted: 'A', 'B', 'C'")
    if option != "C" and stride == 1 and in_channels == out_channels:
        return None
    if option == "A":
        return PaddedIdentity(stride, out_channels - in_channels)
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """relu(bn(conv3x3(relu(bn(conv3x3(x))))) + shortcut(x)); He et al. 2015, figure 5 left."""

    def __init__(
        self, in_channels: int, planes: int, stride: int = 1, shortcut: Shortcut = "B"
    ) -> None:
        super().__init__()
        # Built first and registered last, as torchvision does: one seed then gives both libraries
        # the same weights.
        downsample = make_shortcut(shortcut, in_channels, planes, stride)
        self.out_channels = planes
        self.conv1 = conv3x3(in_channels, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1 reduces, 3x3, 1x1 expands fourfold; He et al. 2015, figure 5 right.

    Args:
        stride_in_1x1: where the block strides. True is the paper's network ("v1"); False strides in
            the 3x3 ("v1.5"), as torchvision, timm and NVIDIA do: about 0.5 % better top-1 for 6 %
            more MACs in ResNet-50.
        groups: groups of the 3x3 (ResNeXt's cardinality, Xie et al. 2016, arXiv:1611.05431).
        base_width: channels of a group per 64 planes (ResNeXt's 4d; 128 in Wide ResNet-50-2,
            Zagoruyko and Komodakis 2016, arXiv:1605.07146).
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        shortcut: Shortcut = "B",
        stride_in_1x1: bool = False,
        groups: int = 1,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        self.out_channels = 4 * planes
        width = planes * base_width // 64 * groups
        downsample = make_shortcut(shortcut, in_channels, self.out_channels, stride)
        self.conv1 = conv1x1(in_channels, width, stride if stride_in_1x1 else 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, 1 if stride_in_1x1 else stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, self.out_channels)
        self.bn3 = nn.BatchNorm2d(self.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class PlainBlock(nn.Module):
    """BasicBlock without its shortcut: the network that degrades with depth.

    Not a subclass of BasicBlock, so that nothing that looks for residual blocks takes it for one.
    """

    def __init__(self, in_channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.out_channels = planes
        self.conv1 = conv3x3(in_channels, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


def make_preact_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """Builds a 1x1 projection without batch-norm where the shape changes; else None, the identity.

    It reads the block's shared BN-ReLU, as in the authors' KaimingHe/resnet-1k-layers.
    """
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv1x1(in_channels, out_channels, stride))


class PreActBasicBlock(nn.Module):
    """conv3x3(relu(bn(conv3x3(relu(bn(x)))))) + shortcut; He et al. 2016 (arXiv:1603.05027).

    Nothing follows the sum, so that an identity path runs through the whole network.
    """

    def __init__(self, in_channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.out_channels = planes
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_preact_shortcut(in_channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(self.conv1(active))))
        out += x if self.downsample is None else self.downsample(active)
        return out


class PreActBottleneck(nn.Module):
    """The three-layer pre-activation unit of He et al. 2016; arguments as in Bottleneck."""

    def __init__(
        self, in_channels: int, planes: int, stride: int = 1, stride_in_1x1: bool = False
    ) -> None:
        super().__init__()
        self.out_channels = 4 * planes
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, planes, stride if stride_in_1x1 else 1)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, 1 if stride_in_1x1 else stride)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, self.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_preact_shortcut(in_channels, self.out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(self.conv1(active))))
        out = self.conv3(self.relu(self.bn3(out)))
        out += x if self.downsample is None else self.downsample(active)
        return out


Block = BasicBlock | Bottleneck | PlainBlock | PreActBasicBlock | PreActBottleneck
BlockFactory = Callable[[int, int, int], Block]


def make_blocks(
    factory: BlockFactory, in_channels: int, planes: int, count: int, stride: int
) -> list[Block]:
    """Builds the `count` blocks of one stage; the first of them strides."""
    blocks = [factory(in_channels, planes, stride)]
    for _ in range(count - 1):
        blocks.append(factory(blocks[-1].out_channels, planes, 1))
    return blocks
