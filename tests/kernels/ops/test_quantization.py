"""Quantization and the twins of int8 kernels against numbers worked out in fp64."""

import math

import pytest
import torch

from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry, dtypes_of, math_mode_of
from resfuse.kernels.ops.quantization import (
    FLOAT32_PRODUCTS,
    INT32_PRODUCTS,
    Quantization,
    affine_ref,
    conv_ref,
    dequantize,
    mean_ref,
    quantize,
    quantize_weights,
    requantization,
)


def test_scales_are_float32_and_zero_points_stored_values() -> None:
    stored = Quantization(0.1, 3)
    assert stored.scale == torch.tensor(0.1).item() != 0.1
    assert stored == Quantization(stored.scale, 3) and hash(stored)
    assert stored.inverse_scale == (torch.tensor(1.0) / torch.tensor(0.1)).item()
    assert (stored.least, stored.largest) == (-3 * stored.scale, 252 * stored.scale)
    for scale in (0.0, -1.0, math.nan, math.inf, 1e-39, 1e38, 1e300):
        with pytest.raises(ValueError, match="argument scale"):
            Quantization(scale, 0)
    for zero_point in (-1, 256, 0.0, True, None):
        with pytest.raises(ValueError, match="argument zero_point"):
            Quantization(1.0, zero_point)  # type: ignore[arg-type]


def test_limits_of_sums() -> None:
    assert INT32_PRODUCTS * 255 * 128 < 2**31 <= (INT32_PRODUCTS + 1) * 255 * 128
    assert FLOAT32_PRODUCTS * 255 * 128 <= 2**24 < (FLOAT32_PRODUCTS + 1) * 255 * 128


def test_values_round_half_to_even_and_are_clipped() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 300, -300, math.nan, math.inf, -math.inf])
    assert quantize(x, Quantization(1.0, 1)).tolist() == [1, 3, 3, 1, 0, 255, 0, 1, 255, 0]
    every = torch.arange(256).to(torch.uint8)
    for stored in (Quantization(0.037, 0), Quantization(3e-20, 200)):
        assert torch.equal(quantize(dequantize(every, stored), stored), every)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("zero_point", [0, 131])
def test_a_convolution_is_that_of_the_real_numbers(groups: int, zero_point: int) -> None:
    generator = torch.Generator().manual_seed(0)
    geometry = Geometry((2, 1), (1, 2), (1, 2), groups)
    real = torch.randn(12, 6 // groups, 3, 2, generator=generator, dtype=torch.float64)
    real[3] = 0
    bias = torch.randn(12, generator=generator)
    stored, out = Quantization(0.02, zero_point), Quantization(0.11, 77)
    x = torch.randint(0, 256, (2, 6, 7, 5), generator=generator).to(torch.uint8)
    weight, scale = quantize_weights(real)
    error = (weight.double() * scale.view(-1, 1, 1, 1) - real).abs()
    assert bool((error <= scale.view(-1, 1, 1, 1) * 0.5000001).all()) and scale[3] == 1
    how = requantization(weight, scale, bias, stored)
    exact = torch.nn.functional.conv2d(
        dequantize(x, stored).double(), weight.double() * scale.view(-1, 1, 1, 1), bias.double(),
        *geometry,
    )  # fmt: skip
    got = conv_ref(x, weight, how, stored, None, geometry, "relu")
    assert got.dtype == torch.float32
    assert float((got - exact.relu()).abs().max()) < 1e-5
    assert torch.equal(conv_ref(x, weight, how, stored, out, geometry, "relu"), quantize(got, out))
    sums = torch.nn.functional.conv2d(
        torch.nn.functional.pad(x.double(), (2, 2, 1, 1), value=zero_point), weight.double(),
        None, geometry.stride, (0, 0), geometry.dilation, groups,
    )  # fmt: skip
    plain = (sums + how.offset.view(1, -1, 1, 1)).float()
    folded = plain * how.scale.view(1, -1, 1, 1) + how.bias.view(1, -1, 1, 1)
    assert torch.equal(folded.relu(), got)  # the offset stands for x's zero point


def test_residuals_are_added_before_or_after_the_activation() -> None:
    x = torch.tensor([10, 20, 30]).to(torch.uint8).view(1, 3, 1, 1)
    added = torch.tensor([0, 5, 9]).to(torch.uint8).view(1, 3, 1, 1)
    stored, other = Quantization(1.0, 20), Quantization(0.5, 5)
    one, none = torch.ones(1), torch.zeros(1)
    before = affine_ref(x, one, none, stored, None, "relu", None, added, other)
    after = affine_ref(x, one, none, stored, None, "relu", None, added, other, True)
    assert before.flatten().tolist() == [0, 0, 12] and after.flatten().tolist() == [-2.5, 0, 12]


def test_a_mean_is_rounded_once() -> None:
    x = torch.tensor([[1, 2], [3, 5]]).to(torch.uint8).view(1, 1, 2, 2)
    stored = Quantization(2.0, 1)
    assert mean_ref(x, stored, None).item() == 3.5
    assert mean_ref(x, stored, Quantization(1.0, 10)).item() == 14  # 13.5


def test_what_is_not_finite_is_refused() -> None:
    weight, scale = quantize_weights(torch.ones(2, 1, 1, 1, dtype=torch.float64))
    for bias in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            requantization(weight, scale, torch.tensor([0.0, bias]), Quantization(1.0, 0))
    with pytest.raises(ValueError, match="finite"):
        requantization(weight, scale * 1e42, torch.zeros(2), Quantization(1.0, 0))


@pytest.mark.parametrize(("mode", "output"), [("int8", torch.uint8), ("int8_fp32", torch.float32)])
def test_problems_in_int8_are_saved_and_cost_what_they_move(mode: str, output: torch.dtype) -> None:
    problem = ConvProblem(2, 8, 4, 4, 16, 1, 1, dtypes=dtypes_of(mode))
    assert problem.math_mode == mode and problem.dtype == torch.uint8
    assert ConvProblem.from_plain(problem.to_plain()) == problem
    assert problem.read_bytes == 2 * 8 * 16 + 8 * 16 + 4 * 16  # the bias is float32
    assert problem.least_bytes == problem.read_bytes + output.itemsize * 2 * 16 * 16
    for dtype in (torch.uint8, torch.int8):
        with pytest.raises(ValueError, match=r"accepted: torch\.float32"):
            math_mode_of(dtype)
