"""Small networks for tests of fuse, and whether a fused one answers as it does."""

import copy

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from graphs import error
from resfuse.kernels.fusion.planning.plan import plan_of
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES

IMAGES = (2, 3, 33, 40)  # not 32: see test_fuse_zoo.SIZES


def network(seed: int = 0) -> nn.Module:
    """A ResNet-18 whose batch norms are not the identity."""
    torch.manual_seed(seed)
    model = resnet18(num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def conv_bn(channels: int = 8) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(channels)
    nn.init.normal_(bn.running_mean)
    return {"conv": nn.Conv2d(channels, channels, 3, padding=1), "bn": bn}


def images(seed: int = 1, shape: tuple[int, ...] = IMAGES) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def require_same(fused_model: nn.Module, plain: nn.Module, x: Tensor, mode: str = "ieee") -> None:
    """The rule of the whole project: at most twice eager's own error against fp64."""
    reference = copy.deepcopy(plain).double()(x.double())
    allowed = EAGER_FACTOR * error(plain(x), reference) + TOLERANCES[mode].rtol
    assert error(fused_model(x), reference) <= allowed


def is_fused(model: nn.Module) -> bool:
    return any(plan_of(module) is not None for module in model.modules())
