"""Convolutions for `fuse` whose channels fill no whole vector: a tensor's pixels have no room
behind their channels, so nothing behind the last one may be read or written.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from guarded_pages import GuardedPages
from resfuse.kernels.cpu import packed_conv
from resfuse.kernels.cpu.conv_calls import ConvCall
from resfuse.kernels.cpu.conv_program import ConvProgram
from resfuse.kernels.cpu.library import Storage
from resfuse.kernels.cpu.packed_conv import LEAST_CHANNELS, NativeConv, refusal
from resfuse.kernels.ops.conv_problem import Geometry

# name -> kernel, stride, dilation, batch, size of the map. The 3x3 with stride 1 has a loop of its
# own; rows of 11 are one of 8 pixels and one of 3.
WINDOWS = {
    "3x3": (3, 1, 1, 1, (7, 11)),
    "3x3, three images": (3, 1, 1, 3, (5, 6)),
    "3x3 with stride 2": (3, 2, 1, 3, (9, 8)),
    "3x3 with dilation": (3, 1, 2, 1, (9, 7)),
    "5x5": (5, 1, 1, 3, (6, 7)),
    "5x5 with stride 2": (5, 2, 1, 1, (11, 9)),
    "3x3 on one pixel": (3, 1, 1, 1, (1, 1)),
}
SIZES = [(c, of_each) for of_each in (1, 2, 4, 8) for c in range(16, 41) if c % of_each == 0]


def images(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def geometry(window: str, groups: int) -> Geometry:
    kernel, stride, dilation, *_ = WINDOWS[window]
    pad = dilation * (kernel // 2)
    return Geometry((stride, stride), (pad, pad), (dilation, dilation), groups)


def exact(x: Tensor, weight: Tensor, bias: Tensor, at: Geometry) -> Tensor:
    return F.relu(F.conv2d(x.double(), weight.double(), bias.double(), *at))


def widened(per_channel: Tensor, channels: int, dim: int = 0) -> Tensor:
    """With as many channels as fill vectors, of zeros."""
    missing = -channels % 16
    return torch.cat([per_channel, per_channel.narrow(dim, 0, missing) * 0], dim)


@pytest.mark.parametrize("window", WINDOWS)
def test_groups_are_right_and_have_the_bits_of_channels_that_fill_vectors(window: str) -> None:
    kernel, _, _, n, size = WINDOWS[window]
    for c, of_each in SIZES:
        at = geometry(window, c // of_each)
        weight, bias = images(c, of_each, kernel, kernel, seed=1), images(c, 1, 1, 1)[:, 0, 0, 0]
        x = images(n, c, *size, seed=2)
        assert refusal(weight, at, "relu") is None
        y = NativeConv(weight, bias, at, "relu", None)(x)
        torch.testing.assert_close(y.double(), exact(x, weight, bias, at), rtol=1e-5, atol=1e-5)
        wide = at._replace(groups=(c + -c % 16) // of_each)
        full = NativeConv(widened(weight, c), widened(bias, c), wide, "relu", None)
        assert torch.equal(y, full(widened(x, c, 1))[:, :c])


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_nothing_beside_the_tensors_is_touched(
    window: str, storage: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind input, residual and result lies a page that ends the process."""
    kernel, _, _, n, size = WINDOWS[window]
    dtype = torch.float32 if storage == "fp32" else torch.bfloat16
    pages = GuardedPages()

    def placed(shape: tuple[int, ...], dtype: torch.dtype = dtype) -> Tensor:
        n, c, h, w = shape
        return pages.place(torch.zeros(n, h, w, c, dtype=dtype)).permute(0, 3, 1, 2)

    monkeypatch.setattr(packed_conv, "empty_output", placed)
    for c, of_each in [(17, 1), (20, 2), (36, 4), (24, 8), (58, 1), (23, 23), (72, 24), (42, 21)]:
        at = geometry(window, c // of_each)
        weight = images(c, of_each, kernel, kernel, seed=1).to(dtype)
        bias = images(c, 1, 1, 1)[:, 0, 0, 0]
        native = NativeConv(weight, bias, at, activation, None)
        x = placed((n, c, *size)).copy_(images(n, c, *size, seed=2))
        y = native(x)
        residual = placed(tuple(y.shape)).copy_(images(*y.shape, seed=3))
        added = native.add(x, residual)
        over = native.add(x, residual.clone(memory_format=torch.preserve_format), overwrite=True)
        assert torch.equal(added, over)
        pages.require_intact()


@pytest.mark.parametrize("of_each", [1, 4])
def test_bfloat16_is_rounded_once(of_each: int) -> None:
    c = 36
    at = geometry("3x3", c // of_each)
    weight, bias = images(c, of_each, 3, 3, seed=1).bfloat16(), images(c, 1, 1, 1)[:, 0, 0, 0]
    x = images(3, c, 9, 11).bfloat16()
    y = NativeConv(weight, bias, at, "relu", None)(x)
    want = exact(x, weight, bias, at)
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("c", [17, 58])
def test_inputs_in_any_memory_format_give_the_same_bits(c: int) -> None:
    at = geometry("3x3", c)
    native = NativeConv(images(c, 1, 3, 3, seed=1), torch.ones(c), at, "relu", None)
    x = images(3, 2 * c, 9, 7)
    part = x[:, ::2]  # every other channel
    want = native(part.contiguous(memory_format=torch.channels_last))
    assert torch.equal(native(part.contiguous()), want) and torch.equal(native(part), want)
    assert torch.equal(native(x[:, c:]), native(x[:, c:].contiguous()))


@pytest.mark.parametrize("of_each", [1, 2])
def test_nan_and_infinity_stay_in_their_groups(of_each: int) -> None:
    c = 22
    at = geometry("3x3", c // of_each)
    weight, bias = images(c, of_each, 3, 3, seed=1), torch.zeros(c)
    x = images(1, c, 7, 9)
    x[0, c - 1, 3, 4], x[0, 16, 0, 0] = float("nan"), float("inf")
    got, want = NativeConv(weight, bias, at, "relu", None)(x), exact(x, weight, bias, at)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert not got[:, : c - of_each - 6].isnan().any()


# In groups of whole vectors, and of some more channels than those: 24, 120, 21, 9.
_APART = [(96, 96, 3), (64, 128, 2), (6, 32, 2), (32, 96, 2),
          (72, 72, 3), (240, 240, 2), (48, 63, 3), (10, 18, 2)]  # fmt: skip


@pytest.mark.parametrize(("c", "k", "groups"), _APART)
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_groups_that_fill_more_than_half_a_vector_are_direct(
    c: int, k: int, groups: int, storage: str
) -> None:
    dtype = torch.float32 if storage == "fp32" else torch.bfloat16
    at = geometry("3x3", groups)
    weight = (images(k, c // groups, 3, 3, seed=1) / 16).to(dtype)
    bias, x = images(k, 1, 1, 1)[:, 0, 0, 0], images(2, c, 7, 9).to(dtype)
    native = NativeConv(weight, bias, at, "relu", None)
    tolerance = 1e-5 if storage == "fp32" else 2**-8
    want = exact(x, weight, bias, at)
    torch.testing.assert_close(native(x).double(), want, rtol=tolerance, atol=1e-5)
    assert torch.equal(native.dense_weight(), weight.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [(7, 9), (112, 112)])
def test_programs_and_strips_have_the_bits_of_their_layers(
    size: tuple[int, int], storage: Storage
) -> None:
    """An inverted residual of 36 and 72 channels; the larger map is computed in strips."""

    def conv(k: int, c: int, kernel: int, at: Geometry, activation: str) -> NativeConv:
        weight = images(k, c, kernel, kernel) / c**0.5
        return NativeConv(weight, torch.ones(k), at, activation, None, storage=storage)

    expand = conv(72, 36, 1, Geometry(), "relu")
    depthwise = conv(72, 1, 3, geometry("3x3", 72), "relu")
    project = conv(37, 72, 1, Geometry(), "identity")
    calls = [ConvCall(expand, 0), ConvCall(depthwise, 1), ConvCall(project, 2)]
    x = images(1, 36, *size)
    (y,) = ConvProgram(1, calls, [3])(x)
    assert torch.equal(y, project(depthwise(expand(x))))


def test_few_output_channels_are_left_to_onednn() -> None:
    few = torch.zeros(LEAST_CHANNELS - 1, 1, 3, 3)
    assert refusal(few, Geometry(groups=len(few)), "relu") == f"only {len(few)} output channels"
