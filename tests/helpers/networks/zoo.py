"""Other people's networks, as fuse meets them: the parts that no package on PyPI ships, and VGG
without its weight."""

import torch
import torchvision
from torch import Tensor, nn


def vgg19_bn() -> nn.Module:
    """torchvision's, its linear layers 64 features wide instead of 4096: 22 million weights instead
    of 144, of which tests make copies in fp64, too."""
    model = torchvision.models.vgg19_bn(weights=None, init_weights=False)
    for at, (fan_in, fan_out) in {0: (512 * 49, 64), 3: (64, 64), 6: (64, 10)}.items():
        model.classifier[at] = nn.Linear(fan_in, fan_out)
    return model


class IResNetBlock(nn.Module):
    """The unit of ArcFace's IResNet: BN-conv-BN-PReLU-conv-BN, and a sum nothing follows."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes, eps=1e-05)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, eps=1e-05)
        self.prelu = nn.PReLU(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes, eps=1e-05)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes, eps=1e-5)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn1(x)
        out = self.conv1(out)
        out = self.bn2(out)
        out = self.prelu(out)
        out = self.conv2(out)
        out = self.bn3(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return out


class IResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.prelu = nn.PReLU(16)
        self.layer1 = nn.Sequential(IResNetBlock(16, 32, 2), IResNetBlock(32, 32))
        self.bn2 = nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.layer1(self.prelu(self.bn1(self.conv1(x)))))


def darknet_conv(c: int, k: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c, k, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(k),
        nn.LeakyReLU(0.1, inplace=True),
    )


class DarknetResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = darknet_conv(channels, channels // 2, 1)
        self.expand = darknet_conv(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(self.reduce(x))


class Darknet(nn.Module):
    """The first two stages of Darknet-53 (YOLOv3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = darknet_conv(3, 16, 3)
        self.down1, self.block1 = darknet_conv(16, 32, 3, 2), DarknetResidual(32)
        self.down2 = darknet_conv(32, 64, 3, 2)
        self.block2 = nn.ModuleList([DarknetResidual(64) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.down1(self.stem(x)))
        x = self.down2(x)
        for block in self.block2:
            x = block(x)
        return x


class YoloConv(nn.Module):
    """Convolution, batch norm, SiLU, as in YOLOv5 and v8."""

    default_act = nn.SiLU()

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = self.default_act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class YoloBottleneck(nn.Module):
    def __init__(self, c: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2 = YoloConv(c, c, 3), YoloConv(c, c, 3)
        self.add = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """YOLOv8's stage: split, a chain of bottlenecks, everything concatenated."""

    def __init__(self, c1: int = 3, c2: int = 32, n: int = 2) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1 = YoloConv(c1, 2 * self.c)
        self.cv2 = YoloConv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(YoloBottleneck(self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))
