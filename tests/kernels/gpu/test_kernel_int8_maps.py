"""convert_int8 and pool_int8: kernels against their twins, bit for bit, in the interpreter or on a
GPU; sizes are tiny, and ragged in every direction.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_inputs import DEVICE
from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.gpu.int8_maps import convert, pool
from resfuse.kernels.gpu.int8_maps.convert import convert_int8, convert_int8_ref
from resfuse.kernels.gpu.int8_maps.pool import PoolProblem, pool_int8, pool_int8_ref
from resfuse.kernels.ops.quantization import (
    Quantization,
    dequantize,
    less_128,
    max_pool_ref,
    mean_ref,
    plus_128,
    quantize,
)

pytestmark = pytest.mark.slow
ZERO_POINTS = (0, 71, 128, 255)


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return less_128(channels_last(values.to(DEVICE)))


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_numbers_become_integers_as_quantize_has_it(zero_point: int) -> None:
    """Halves, which go to the even; numbers beyond the range; and those that are none."""
    how = Quantization(0.25, zero_point)
    halves = torch.arange(-300, 300, device=DEVICE) / 8
    odd = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 1e30, -1e30], device=DEVICE)
    x = torch.cat([halves, odd])
    got = convert_int8(x, how)
    assert torch.equal(plus_128(got), quantize(x, how))
    assert torch.equal(convert_int8(got, how), dequantize(quantize(x, how), how))


def test_a_conversion_keeps_the_memory_format() -> None:
    how, x = Quantization(0.02, 3), torch.randn(2, 5, 7, 3, device=DEVICE)
    for given in (x, channels_last(x), x.movedim(1, -1)[:, ::2]):
        got = convert_int8(given, how)
        assert torch.equal(got, convert_int8_ref(given, how))
        assert got.is_contiguous(memory_format=torch.channels_last) == given.is_contiguous(
            memory_format=torch.channels_last
        )
    with pytest.raises(ValueError, match=r"argument x: torch.float16; accepted: torch.float32"):
        convert_int8(x.half(), how)


MAX_POOLS: dict[str, PoolProblem] = {
    "a stem's": PoolProblem(2, 24, 9, 8, 5, 4, (3, 3), (2, 2), (1, 1)),
    "no two alike": PoolProblem(1, 70, 9, 11, 3, 4, (3, 2), (3, 2), (1, 0), (1, 3)),
    "one pixel": PoolProblem(3, 5, 1, 1, 1, 1, (3, 3), (1, 1), (1, 1)),
    "beyond the far edge": PoolProblem(1, 16, 6, 7, 3, 4, (3, 3), (2, 2), (0, 0)),
}


@pytest.mark.parametrize("name", MAX_POOLS)
def test_the_largest_value_of_each_window(name: str) -> None:
    problem = MAX_POOLS[name]
    x = drawn(*problem.input_shape)
    for given in (x, torch.full_like(x, -128)):  # what padding must not be larger than
        got = pool_int8(given, problem)
        assert got.dtype == torch.int8 and got.shape == problem.output_shape
        assert torch.equal(got, pool_int8_ref(given, problem))
    if name != "beyond the far edge":
        windows = problem.kernel, problem.stride, problem.padding, problem.dilation
        assert torch.equal(plus_128(pool_int8(x, problem)), max_pool_ref(plus_128(x), *windows))


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("output", [Quantization(0.011, 90), None], ids=["int8", "fp32"])
def test_the_mean_of_each_map(zero_point: int, output: Quantization | None) -> None:
    problem = PoolProblem(3, 37, 7, 5, 1, 1, (7, 5), (1, 1), (0, 0))
    x, stored = drawn(*problem.input_shape), Quantization(0.013, zero_point)
    divisors = torch.full((1, 1), 35.0, device=DEVICE)
    got = pool_int8(x, problem, divisors, stored, output)
    want = mean_ref(plus_128(x), stored, output)
    assert torch.equal(got, want if output is None else less_128(want))


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_average_pools_whose_windows_have_divisors_of_their_own(zero_point: int) -> None:
    problem = PoolProblem(2, 19, 8, 7, 5, 4, (3, 3), (2, 2), (1, 1))
    ones = torch.ones(1, 1, 8, 7)
    counts = F.avg_pool2d(ones, 3, 2, 1, ceil_mode=True, divisor_override=1)[0, 0, :, :4]
    x, stored = drawn(*problem.input_shape), Quantization(0.013, zero_point)
    given = x, problem, counts.contiguous().to(DEVICE), stored, Quantization(0.007, 40)
    assert torch.equal(pool_int8(*given), pool_int8_ref(*given))


def test_every_configuration_computes_the_same() -> None:
    problem = PoolProblem(2, 300, 5, 4, 3, 2, (3, 3), (2, 2), (1, 1))
    x = drawn(*problem.input_shape)
    want = pool_int8_ref(x, problem)
    assert set(pool.candidates(problem)) == set(pool.CONFIGS)
    for config in pool.candidates(problem):
        y = torch.full_like(want, 99)
        pool.launch(problem, x, y, config).run()
        assert torch.equal(y, want), config
    how = Quantization(0.02, 100)
    numbers = torch.randn(3000, device=DEVICE)
    for block in convert.CONFIGS:
        y = torch.full((3000,), 99, dtype=torch.int8, device=DEVICE)
        convert.launch(numbers, y, how, block).run()
        assert torch.equal(y, convert_int8_ref(numbers, how)), block


def test_they_are_operations_of_torchs() -> None:
    problem = MAX_POOLS["a stem's"]
    x, how = drawn(*problem.input_shape), Quantization(0.02, 3)
    divisors = torch.full((5, 4), 9.0, device=DEVICE)
    windows = [5, 4, 3, 3, 2, 2, 1, 1, 1, 1]
    for given in (
        (None, None, None),
        (divisors, (0.02, 3.0), None),
        (divisors, (0.02, 3.0), (0.1, 7.0)),
    ):
        torch.library.opcheck(torch.ops.resfuse.pool_int8, (x, *given, windows))
    torch.library.opcheck(torch.ops.resfuse.convert_int8, (x, how.scale, how.zero_point))
    torch.library.opcheck(torch.ops.resfuse.convert_int8, (x.float(), how.scale, how.zero_point))


def test_what_they_do_not_take_is_refused() -> None:
    problem = MAX_POOLS["one pixel"]
    with pytest.raises(ValueError, match=r"argument x: torch.uint8"):
        pool_int8(plus_128(drawn(*problem.input_shape)), problem)
    with pytest.raises(ValueError, match=r"argument stored"):
        pool_int8(drawn(*problem.input_shape), problem, stored=Quantization(1.0, 0))
    huge = PoolProblem(4096, 64, 112, 112, 56, 56, (3, 3), (2, 2), (1, 1))
    assert "2**31" in str(pool.refusal(huge))
    assert pool.refusal(PoolProblem(256, 64, 112, 112, 56, 56, (3, 3), (2, 2), (1, 1))) is None
