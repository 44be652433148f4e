"""Squeeze-and-excitation: convolutions of one pixel, whose strides are contiguous and channels_last
at once, so that only eager can say which of them a result has."""

import copy

import pytest
import torch
from torch import Tensor, nn

from resfuse.kernels import fuse
from resfuse.kernels.cpu.packed_conv import NativeConv


class Gate(nn.Module):
    def __init__(self, inplace: bool, keepdim: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.down, self.act = nn.Conv2d(32, 16, 1), nn.ReLU(inplace)
        self.up, self.pool, self.keepdim = nn.Conv2d(16, 32, 1), nn.AdaptiveAvgPool2d(1), keepdim

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.relu(self.norm(self.conv(x)))
        z = y.mean((2, 3), keepdim=True) if self.keepdim else self.pool(y)
        down = self.act(self.down(z))
        up = self.up(down)
        return y * up.sigmoid(), down, up


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("images", [1, 3])
def test_values_and_strides_are_eagers(
    inplace: bool, keepdim: bool, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain = Gate(inplace, keepdim).eval()
    exact = copy.deepcopy(plain).double()
    native: list[torch.Size] = []
    call = NativeConv.__call__

    def counted(self: NativeConv, x: Tensor) -> Tensor:
        native.append(x.shape)
        return call(self, x)

    monkeypatch.setattr(NativeConv, "__call__", counted)
    x = torch.randn(images, 16, 6, 5)
    for model in (plain, plain.to(memory_format=torch.channels_last)):
        fused = fuse(model)
        for given in (x, x.to(memory_format=torch.channels_last), x[:, :, :1, :1]):
            with torch.inference_mode():
                for _ in range(3):
                    results = zip(fused(given), model(given), exact(given.double()), strict=True)
                    for got, eager, want in results:
                        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
                        assert got.stride() == eager.stride()
    assert torch.Size((images, 32, 1, 1)) in native, "a gate runs on native steps"


def test_changed_weights_and_formats_are_followed() -> None:
    torch.manual_seed(0)
    plain = Gate(True, True).eval()
    fused = fuse(plain)
    x = torch.randn(1, 16, 6, 5).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        fused(x), fused(x)
    for model in (plain, fused):
        with torch.no_grad():
            model.up.weight.mul_(2)  # type: ignore[operator, union-attr]
    with torch.inference_mode():
        for given in (x, x.contiguous(), x.expand(3, -1, -1, -1).contiguous()):
            for got, want in zip(fused(given), plain(given), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
                assert got.stride() == want.stride()
