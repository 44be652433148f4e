"""Blocks to build networks from, fused in eval mode. Layers and parameter names are torchvision's:
checkpoints interchange.

    torchvision.models.resnet.ResNet(FusedBottleneck, [3, 4, 6, 3])
"""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn

from resfuse.kernels.fusion.fuse import fuse
from resfuse.kernels.fusion.planning.plan import plan_of
from resfuse.kernels.ops.activation import ACTIVATIONS

Norm = Callable[[int], nn.Module]


class _FusesInEval(nn.Module):
    """Becomes fused when it enters eval mode. (A module starts in training mode, where the layers
    themselves run.)"""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if not mode and plan_of(self) is None:
            fuse(self, inplace=True)
        return self


class FusedConvBNAct(_FusesInEval):
    """act(bn(conv(x)) + residual); state_dict keys `conv.weight`, `bn.weight`, ...

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups: as in nn.Conv2d.
        padding: None keeps the size at stride 1.
        activation: a name of ACTIVATIONS; "prelu" and "leaky_relu" as torch initialises them.
        norm_layer: makes the batch norm.

    Raises:
        ValueError: the activation is not known.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        activation: str = "relu",
        norm_layer: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        same = (kernel_size - 1) // 2 * dilation
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, same if padding is None else padding,
            dilation, groups, bias=False,
        )  # fmt: skip
        self.bn = norm_layer(out_channels)
        self.act = _activation(activation, out_channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Computes y [N, K, P, Q] from x [N, C, H, W] and a residual [N, K, P, Q]."""
        y = self.bn(self.conv(x))
        z: Tensor = self.act(y if residual is None else y + residual)
        return z


class FusedBasicBlock(_FusesInEval):
    """Two 3x3 convolutions and a shortcut; He et al. 2015 (arXiv:1512.03385), figure 5 left.

    Arguments as torchvision's BasicBlock, which has neither groups, nor width, nor dilation.

    Raises:
        ValueError: groups, base_width or dilation is given.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        for name, value, only in (
            ("groups", groups, 1), ("base_width", base_width, 64), ("dilation", dilation, 1)
        ):  # fmt: skip
            if value != only:
                raise ValueError(f"argument {name}: {value}; accepted: {only} in a basic block")
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Computes y [N, planes, P, Q] from x [N, C, H, W]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        y: Tensor = self.relu(out)
        return y


class FusedBottleneck(_FusesInEval):
    """1x1, 3x3 (which strides: v1.5), 1x1, and a shortcut; He et al. 2015, figure 5 right.

    Arguments as torchvision's Bottleneck: groups and base_width make ResNeXt (arXiv:1611.05431) and
    Wide ResNet (arXiv:1605.07146).
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(
            width, width, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
        )
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Computes y [N, 4 planes, P, Q] from x [N, C, H, W]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        y: Tensor = self.relu(out)
        return y


def _activation(name: str, channels: int) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"argument activation: {name!r}; accepted: {', '.join(ACTIVATIONS)}")
    return {
        "identity": nn.Identity(),
        "relu": nn.ReLU(inplace=True),
        "relu6": nn.ReLU6(inplace=True),
        "silu": nn.SiLU(inplace=True),
        "leaky_relu": nn.LeakyReLU(inplace=True),
        "prelu": nn.PReLU(channels),
        "hardswish": nn.Hardswish(inplace=True),
        "sigmoid": nn.Sigmoid(),
        "hardsigmoid": nn.Hardsigmoid(inplace=True),
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU("tanh"),
    }[name]
