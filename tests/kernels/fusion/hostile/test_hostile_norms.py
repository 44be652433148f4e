"""Norms that may or may not apply an activation of their own, or are not what they are called."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d as TorchvisionsFrozen

from hostile import outcome, pair_of
from resfuse.kernels import fuse
from resfuse.kernels.ops.bn_folding import bn_scale_shift

timm_norms = pytest.importorskip("timm.layers.norm_act")
X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class FrozenBatchNorm2d(nn.Module):
    """As maskrcnn-benchmark's: without an eps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)
        self.eps = 0.5  # which forward does not look at

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.running_var.rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def named_act() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    norm.act = nn.ReLU()  # torch's forward does not look at it
    return norm


NORMS: dict[str, Any] = {
    "applies none": lambda: timm_norms.BatchNormAct2d(8, apply_act=False),
    "Identity": lambda: timm_norms.BatchNormAct2d(8, act_layer=nn.Identity),
    "ReLU": lambda: timm_norms.BatchNormAct2d(8),
    "SiLU": lambda: timm_norms.BatchNormAct2d(8, act_layer=nn.SiLU),
    "GELU": lambda: timm_norms.BatchNormAct2d(8, act_layer=nn.GELU),
    "drops": lambda: timm_norms.BatchNormAct2d(8, drop_layer=nn.Dropout),
    "frozen, none": lambda: timm_norms.FrozenBatchNormAct2d(8, apply_act=False),
    "frozen, ReLU": lambda: timm_norms.FrozenBatchNormAct2d(8),
    "group norm": lambda: timm_norms.GroupNormAct(8, 2),
    "torch's with an attribute": named_act,
    "torchvision's frozen": lambda: TorchvisionsFrozen(8),
    "another frozen": lambda: FrozenBatchNorm2d(8),
}


class Net(nn.Module):
    def __init__(self, norm: nn.Module, order: str) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(8, 8, 3, padding=1), norm, nn.ReLU()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "alone":  # RepVGG's identity branch
            return self.act(self.conv(x).sigmoid() + self.norm(x))
        if self.order == "sum":
            return self.act(self.norm(self.conv(x)) + x)
        return self.act(self.norm(self.conv(x))) - 1


def net(norm: str, order: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net(NORMS[norm](), order).eval()
    with torch.no_grad():
        for name, tensor in model.norm.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5 if "var" in name else tensor + 0.3)
    return model


@pytest.mark.parametrize("order", ["alone", "sum", "plain"])
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_a_norm_computes_what_its_forward_does(norm: str, order: str) -> None:
    plain = net(norm, order)
    fused = fuse(plain)
    for x in (X, X, X[0], X[:0]):
        try:
            wanted = plain(x)
        except Exception as error:
            with pytest.raises(type(error)):
                fused(x)
            continue
        torch.testing.assert_close(fused(x), wanted)
    exported = torch.export.export(fuse(plain), (X,)).module()
    torch.testing.assert_close(exported(X), plain(X))
    for tensor in plain.norm.state_dict().values():
        tensor.mul_(2)
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused(X), plain(X))
    if hasattr(plain.norm, "act"):
        plain.norm.act = fused.norm.act = nn.Hardswish()
        torch.testing.assert_close(fused(X), plain(X))
        for model in (plain, fused):
            model.norm.act.register_forward_hook(lambda m, i, o: o + 1)
        torch.testing.assert_close(fused(X), plain(X))


@torch.no_grad()
def test_buffers_of_frozen_norms_are_followed() -> None:
    plain = net("torchvision's frozen", "plain")
    fused = fuse(plain)
    fused(X)
    for name in ("weight", "bias", "running_mean", "running_var"):
        for model in (plain, fused):
            getattr(model.norm, name).mul_(1.5)
        torch.testing.assert_close(fused(X), plain(X))


@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4", "gernet_s"])
@torch.no_grad()
def test_timms_reparametrised_networks(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=4).eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.weight.uniform_(0.2, 0.6)
            module.bias.normal_(0, 0.2)
    x = torch.randn(1, 3, 64, 64)
    fused = fuse(plain)
    fused(x)
    error = (fused(x) - plain(x)).norm() / plain(x).norm()
    assert error < 1e-4


@pytest.mark.parametrize("variance", [-1e-5, -2e-5, -1.0, 0.0, 1e-42, float("inf"), float("nan")])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@torch.no_grad()
def test_variances_that_divide_by_zero(variance: float, eps: float) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).eval()
    plain[1].eps = eps
    plain[1].running_var[3] = variance
    x = torch.randn(2, 3, 8, 8)
    fused, wanted = fuse(plain), plain(x)
    for _ in range(2):
        got = fused(x)
        assert torch.equal(got.isnan(), wanted.isnan())
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    exact = F.batch_norm(
        x[:, :1].expand(-1, 16, -1, -1), plain[1].running_mean, plain[1].running_var, eps=eps
    )
    scale, _ = bn_scale_shift(plain[1])
    assert bool(scale[3].isfinite()) == bool(exact[:, 3].isfinite().all())


# Dtypes that torch refuses to compute together


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("norm", DTYPES)
@pytest.mark.parametrize("conv", DTYPES)
def test_a_norm_of_another_dtype(conv: torch.dtype, norm: torch.dtype, early: bool) -> None:
    """The same answer, or the same refusal; float32 norms take 16 bits."""

    def changed(model: Any) -> Any:
        model[0].to(conv)
        model[1].to(norm)
        return model

    def make() -> Any:
        model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        return changed(model) if early else model

    plain, fused = pair_of(make)
    if not early:
        changed(plain), changed(fused)
    for dtype in DTYPES:
        want, got = outcome(plain, X.to(dtype)), outcome(fused, X.to(dtype))
        if isinstance(want, str):
            assert got == want
        else:
            assert got.dtype == want.dtype
            torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=3e-2)


@pytest.mark.parametrize("model", DTYPES)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_leaves_float64_and_whole_numbers_alone(
    cast: torch.dtype, model: torch.dtype
) -> None:
    plain, fused = pair_of(
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).to(model)
    )
    for dtype in (*DTYPES, torch.int64):
        with torch.autocast("cpu", cast):
            want, got = outcome(plain, X.to(dtype)), outcome(fused, X.to(dtype))
        if isinstance(want, str):
            assert got == want
        else:
            assert got.dtype == want.dtype
            torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=5e-2)


class _Doubled(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Any) -> Any:
        return self.layers(x * 2 if isinstance(x, torch.Tensor) else x + x)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("first", ["conv", "norm", "stem"])
@torch.no_grad()
def test_a_list_is_refused_in_the_words_of_the_layers(first: str, cast: bool) -> None:
    layers: dict[str, list[nn.Module]] = {
        "conv": [nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)],
        "norm": [nn.BatchNorm2d(8), nn.ReLU()],
        "stem": [
            nn.Conv2d(8, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        ],
    }  # fmt: skip
    plain, fused = pair_of(lambda: _Doubled(*layers[first]))
    fused(X)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        assert outcome(fused, [X]) == outcome(plain, [X])
