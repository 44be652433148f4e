"""Autograd looks on although no fused layer is trained: adapters between frozen layers, tangents.

Native steps are no operations that autograd knows, so what they return would have no gradient, and
no error would say so.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from resfuse.kernels import fuse


class Block(nn.Module):
    """A residual block with something trainable in front of its layers, between them and behind."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.adapter = nn.Parameter(torch.linspace(0.5, 1.5, 32).view(32, 1, 1))
        self.slope = nn.PReLU(32)
        self.norm, self.conv = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.adapter if self.place == "first" else x
        y = self.conv(torch.relu(self.norm(y)))
        y = self.norm2(y)
        if self.place == "between":
            y = self.slope(y * self.adapter)
        y = torch.relu(self.conv2(y) + x)
        return y * self.adapter if self.place == "last" else y


def network(place: str) -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block(place) if i == 1 else Block("nowhere") for i in range(3)]
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), *blocks).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapter" in name or "slope" in name)
    return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("place", ("first", "between", "last"))
@pytest.mark.parametrize("warmed", (torch.no_grad, torch.enable_grad), ids=("no_grad", "grad"))
def test_what_trains_between_frozen_layers_gets_its_gradient(
    place: str, warmed: Callable[[], torch.no_grad]
) -> None:
    """Also after calls that have found a fast path."""
    images = torch.randn(2, 3, 10, 10).to(memory_format=torch.channels_last)
    models = {"eager": network(place), "fused": fuse(network(place))}
    exact = copy.deepcopy(models["eager"]).double()
    exact(images.double()).square().sum().backward()
    for model in models.values():
        with warmed():
            for _ in range(3):
                model(images)
        model(images).square().sum().backward()
    wanted = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    assert wanted
    for model in models.values():
        given = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert given.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(given[name].double(), gradient, rtol=1e-4, atol=1e-4)


def test_tangents_pass_through() -> None:
    images, direction = (torch.randn(2, 3, 10, 10) for _ in range(2))
    eager = network("nowhere").requires_grad_(False)
    fused = fuse(eager)
    found = []
    with torch.no_grad():
        for _ in range(3):
            fused(images)
    for model in (eager, fused):
        with forward_ad.dual_level():
            result = model(forward_ad.make_dual(images, direction))
            found.append(forward_ad.unpack_dual(result).tangent)
    assert found[1] is not None
    torch.testing.assert_close(found[1], found[0])
