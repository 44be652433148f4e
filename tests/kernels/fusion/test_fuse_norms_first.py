"""Batch norms in front of convolutions (DenseNet, ResNet v2, DPN): a native step on a CPU."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.kernels import fuse
from resfuse.kernels.cpu.packed_norm import NativeNorm
from resfuse.kernels.cpu.program import ACTIVATIONS
from resfuse.kernels.ops.activation import ACTIVATIONS as EVERY
from resfuse.kernels.ops.conv_problem import Epilogue

ACTIVE = sorted(set(ACTIVATIONS) - {"leaky_relu", "prelu"})


def images(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def norm_of(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).eval()
    generator = torch.Generator().manual_seed(channels)
    for each in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert each is not None
        each.data.uniform_(0.2, 2.0, generator=generator)
    return norm


class Dense(nn.Module):
    """What a layer of DenseNet does: a norm of a concatenation, and one of a sum behind it."""

    def __init__(self, channels: int = 32, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm_of(2 * channels), nn.Conv2d(2 * channels, channels, 1)
        self.norm2, self.conv2 = norm_of(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.act(self.norm1(torch.cat([x, x * 2], 1))))
        z = self.act(self.norm2(x + y) + y)
        return torch.cat([x, self.conv2(z)], 1)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The channels of the native norms that ran."""
    found: list[int] = []
    call = NativeNorm.__call__

    def counted(self: NativeNorm, x: Tensor, *others: object) -> Tensor:
        found.append(x.shape[1])
        return call(self, x, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(NativeNorm, "__call__", counted)
    return found


@torch.inference_mode()
def require_right(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    want = copy.deepcopy(plain).double()(x.double())
    got, eager = fused(x), plain(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert got.stride() == eager.stride()


@pytest.mark.parametrize("act", [F.relu, F.silu, F.hardswish])
@pytest.mark.parametrize("shape", [(1, 32, 7, 9), (3, 32, 8, 8)])
def test_answers_and_strides_are_the_models(
    act: Callable[[Tensor], Tensor], shape: tuple[int, ...], steps: list[int]
) -> None:
    plain = Dense(act=act).eval()
    fused = fuse(plain)
    for x in (images(*shape), images(*shape).contiguous()):
        require_right(fused, plain, x)
    assert set(steps) == {32, 64}


def test_channels_that_fill_no_vector_run_on_the_layers(steps: list[int]) -> None:
    plain = Dense(9).eval()
    fused = fuse(plain)
    require_right(fused, plain, images(2, 9, 7, 5))
    require_right(fused, plain, images(2, 9, 1, 1))
    assert not steps


def test_statistics_are_read_in_every_call() -> None:
    plain = Dense().eval()
    fused = fuse(plain)
    x = images(2, 32, 6, 6)
    require_right(fused, plain, x)
    for model in (plain, fused):
        model.norm1.running_mean.data.numpy()[3] = 5.0  # type: ignore[union-attr, operator]
        model.norm1.weight.data[2] = -1.0  # type: ignore[union-attr, index]
    require_right(fused, plain, x)


def test_nan_and_infinity_come_out_as_torch_has_them() -> None:
    plain = Dense().eval()
    plain.norm1.weight.data[1], plain.norm1.running_var.data[2] = float("inf"), 0.0  # type: ignore[union-attr]
    plain.norm1.eps = 0.0
    fused = fuse(plain)
    x = images(1, 32, 5, 5)
    x[0, 3, 2, 2], x[0, 4, 1, 1] = float("nan"), -float("inf")
    with torch.inference_mode():
        got, want = fused(x), plain(x)
    assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any()


@pytest.mark.parametrize("activation", ACTIVE)
@pytest.mark.parametrize("residual", ["none", "before", "after"])
def test_every_epilogue_is_right(activation: str, residual: str) -> None:
    channels = 48
    epilogue = Epilogue(activation, residual)  # type: ignore[arg-type]
    x, added = images(2, channels, 5, 7), images(2, channels, 5, 7, seed=1)
    norm = norm_of(channels)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    for affine in ((norm.weight, norm.bias), (None, None)):
        native = NativeNorm(channels, epilogue)
        got = native(x, None if residual == "none" else added, (mean, variance), affine, 1e-5)
        weight, bias = (None if each is None else each.double() for each in affine)
        y = F.batch_norm(x.double(), mean.double(), variance.double(), weight, bias, eps=1e-5)
        y = y + added if residual == "before" else y
        y = EVERY[activation].forward(y, None)
        want = y + added if residual == "after" else y
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_two_threads_have_memory_of_their_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    plain = Dense().eval()
    fused = fuse(plain)
    inputs = [images(1, 32, 9, 9, seed=seed) for seed in range(8)]
    with torch.inference_mode():
        want = [fused(x) for x in inputs]

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return [fused(x) for _ in range(20)][-1]

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(run, inputs))
    assert all(map(torch.equal, got, want))
