"""What is written in place between a layer and the one it would be fused with, or through a list
of modules.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effectful_forwards import kind
from hostile import pair_of, require_alike
from resfuse.kernels import explain, fuse


class Gate(nn.Module):
    """Squeeze and excitation that scales its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x *= self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return x


class Unreadable(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() != 0 else x


class Pure(Gate):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x.mean((2, 3)))
        y *= 2
        return x * F.relu(y, True)[:, :, None, None]


class Setter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = 0
        return x


class Out(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x, 3, out=x)


class View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 1:].unsqueeze(0).mul_(2)
        return x


GATES: list[Any] = [
    Gate, Unreadable, Pure, Setter, Out, View, lambda: nn.ELU(inplace=True),
    lambda: nn.Sequential(nn.Sequential(nn.Hardtanh(inplace=True))), lambda: nn.Softplus(),
    lambda: nn.Threshold(0.1, 20.0, inplace=True),
]  # fmt: skip


def _input_written(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    gated = m.gate(x)
    return m.relu(m.bn(y) + gated)


def _residual_written(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x)) + x
    m.gate(x)
    return m.relu(y) + x


def _middle_written(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = m.gate(y)
    return m.relu(m.bn(y)) + z


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("forward", [_input_written, _residual_written, _middle_written])
def test_writes_in_place(forward: Any, gate: Any) -> None:
    def make() -> nn.Module:
        model = kind(forward)()
        model.gate = gate()
        return model

    require_alike(*pair_of(make))


def test_a_pure_gate_does_not_break_a_chain() -> None:
    def make() -> nn.Module:
        model = kind(_input_written)()
        model.gate = Pure()
        return model

    assert explain(pair_of(make)[1]).lines[0].how == "conv + bn + add + relu"


class ThroughAList(nn.Module):
    """Writes to a layer that it holds in a list, where torch does not see it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = [block]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            block.scale += 0.5
        return x * 0.5


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) * self.scale)


def test_modules_found_in_lists_are_neither_changed_nor_baked_in() -> None:
    torch.manual_seed(0)
    block = Scaled()
    plain = nn.Sequential(ThroughAList(block), block, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    x = torch.randn(2, 3, 4, 4)
    copy = fuse(plain)
    assert copy[1].scale == 1.0
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(copy(x), plain(x))
    assert copy[1].scale == plain[1].scale == 2.5
