"""Activations, however a forward spells them, go into the convolution before them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphs import error
from resfuse.kernels import build_engine
from resfuse.kernels.engine.ir.graph import Conv

SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "relu6 of functional": (F.relu6, "relu6"),
    "ReLU6": (nn.ReLU6(), "relu6"),
    "relu6 as hardtanh": (lambda x: F.hardtanh(x, 0.0, 6.0), "relu6"),
    "relu": (torch.relu, "relu"),
    "hardswish": (F.hardswish, "hardswish"),
    "silu": (F.silu, "silu"),
}


class Activated(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.activation = nn.Conv2d(8, 16, 3, padding=1), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_activation_is_the_convolutions_own(spelling: str) -> None:
    activation, name = SPELLINGS[spelling]
    x = 10 * torch.randn(2, 8, 9, 7)
    model = Activated(activation).eval()
    engine = build_engine(model, x)
    (node,) = engine.graphs[0].nodes
    assert isinstance(node.op, Conv) and node.op.activation == name
    with torch.no_grad():
        assert error(engine(x), model.double()(x.double())) < 1e-6


def test_another_clamp_is_no_relu6() -> None:
    x = 10 * torch.randn(2, 8, 9, 7)
    model = Activated(nn.Hardtanh(-1.0, 6.0)).eval()
    engine = build_engine(model, x)
    with torch.no_grad():
        assert error(engine(x), model.double()(x.double())) < 1e-6
