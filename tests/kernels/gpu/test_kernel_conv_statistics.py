"""A convolution with the statistics of its output: against torch in fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agreement import require_close, require_close_gradients
from kernel_inputs import DEVICE, DTYPES, NEEDS_GPU, convolution, image
from resfuse.kernels.gpu.batch_norm.batch_statistics import batch_statistics, batch_statistics_ref
from resfuse.kernels.gpu.batch_norm.batch_statistics_kernel import Partials, empty_partials
from resfuse.kernels.gpu.batch_norm.bn_add_relu import Norm, bn_add_relu, bn_add_relu_ref
from resfuse.kernels.gpu.batch_norm.conv_statistics import (
    conv_statistics,
    conv_statistics_op,
    conv_statistics_ref,
    launch,
)
from resfuse.kernels.gpu.conv.conv_arguments import Tensors, problem_of
from resfuse.kernels.gpu.conv.conv_config import Config
from resfuse.kernels.ops.conv_problem import Epilogue, Geometry, math_mode_of

# x, k, filter, stride, padding, groups: 3x3s of a ResNet cut small, a strided projection, primes,
# packed groups, groups wider than a tile, one pixel of output an image
CASES: list[tuple[tuple[int, ...], int, tuple[int, int], int, int, int]] = [
    ((2, 16, 7, 6), 32, (3, 3), 1, 1, 1),
    ((2, 16, 7, 6), 24, (3, 3), 2, 1, 1),
    ((2, 8, 6, 6), 16, (1, 1), 2, 0, 1),
    ((3, 5, 5, 3), 7, (3, 1), 1, 1, 1),
    ((2, 16, 5, 5), 16, (3, 3), 1, 1, 4),
    ((3, 9, 3, 3), 70, (3, 3), 1, 0, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_fp64(case: Any, dtype: torch.dtype) -> None:
    shape, k, size, stride, padding, groups = case
    x, weight, bias = convolution(shape, k, size, dtype, groups)
    window = {"stride": (stride,) * 2, "padding": (padding,) * 2, "groups": groups}
    y, partials = conv_statistics(x, weight, bias, **window)
    want, _ = conv_statistics_ref(x.double(), weight.double(), bias.double(), **window)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    require_close(y, want, math_mode_of(dtype), weight[0].numel())
    # The statistics are of y as it was stored, to fp32 whatever its dtype.
    mean, rstd = batch_statistics(y, partials=partials)
    want_mean, want_rstd = batch_statistics_ref(y.double(), 1e-5)
    require_close(mean, want_mean, "ieee", 100)
    require_close(rstd, want_rstd, "ieee", 100)


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_gradients_agree_with_fp64(case: Any) -> None:
    shape, k, size, stride, padding, groups = case
    x, weight, bias = convolution(shape, k, size, groups=groups)
    window: dict[str, Any] = {"stride": (stride,) * 2, "padding": (padding,) * 2, "groups": groups}

    def op(**leaves: Tensor) -> Tensor:
        return conv_statistics(**leaves, **window)[0]

    def twin(**leaves: Tensor) -> Tensor:
        return conv_statistics_ref(**leaves, **window)[0]

    upstream = image(*op(x=x, weight=weight, bias=bias).shape)
    leaves = {"x": x, "weight": weight, "bias": bias}
    require_close_gradients(op, twin, leaves, upstream, "ieee", 1000)


def test_a_norm_follows_it() -> None:
    """Gradients go through both, and through the statistics."""
    x, weight, _ = convolution((3, 6, 5, 5), 8, (3, 3))
    gamma, beta = torch.rand(8, device=DEVICE), torch.rand(8, device=DEVICE)
    upstream = image(3, 8, 5, 5)

    def op(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y, partials = conv_statistics(x, weight, padding=(1, 1))
        return bn_add_relu(y, Norm(gamma, beta), partials=partials)

    def twin(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return bn_add_relu_ref(F.conv2d(x, weight, padding=1), Norm(gamma, beta))

    leaves = {"x": x, "weight": weight, "gamma": gamma, "beta": beta}
    require_close_gradients(op, twin, leaves, upstream, "ieee", 1000)


def test_gradient_formula_against_finite_differences() -> None:
    x, weight, bias = (t.double().requires_grad_() for t in convolution((2, 4, 4, 3), 4, (3, 3)))
    assert torch.autograd.gradcheck(
        lambda *operands: conv_statistics(*operands, stride=(2, 2), padding=(1, 1))[0],
        (x, weight, bias),
    )


@pytest.mark.parametrize(
    "config", [Config(64, 64, 16, 4, 2), Config(16, 16, 16, 1, 1), Config(32, 16, 32, 4, 1)],
    ids=Config.label,
)  # fmt: skip
def test_fills_poisoned_outputs(config: Config) -> None:
    x, weight, bias = convolution((2, 16, 7, 6), 33, (3, 3))
    problem = problem_of(x, weight, Geometry(padding=(1, 1)), Epilogue())
    y = image(2, 33, 7, 6).fill_(float("nan"))
    partials = empty_partials(y, config.tiles(problem)[0])
    for tensor in partials:
        tensor.fill_(float("nan"))
    launch(problem, Tensors(x, weight, bias, None, None, y), partials, config).run()
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    require_close(y, want, "ieee", 16 * 9)
    assert float(partials.counts.sum()) == 2 * 7 * 6
    mean, rstd = batch_statistics(y, partials=Partials(*partials))
    want_mean, want_rstd = batch_statistics_ref(y.double(), 1e-5)
    require_close(mean, want_mean, "ieee", 100)
    require_close(rstd, want_rstd, "ieee", 100)


def test_is_a_well_behaved_operator() -> None:
    x, weight, bias = convolution((2, 8, 5, 4), 8, (3, 3))
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    torch.library.opcheck(conv_statistics_op, (x, weight, bias, [1, 1], [1, 1], [1, 1], 1))


def test_compiles_without_a_graph_break() -> None:
    x, weight, _ = convolution((2, 8, 5, 4), 8, (3, 3))

    def layer(x: Tensor) -> Tensor:
        y, partials = conv_statistics(x, weight)
        return bn_add_relu(y, Norm(None, None), partials=partials)

    torch._dynamo.reset()
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(got, layer(x))


def test_counts_a_convolutions_flops() -> None:
    x, weight, _ = convolution((2, 8, 5, 4), 16, (3, 3))
    with FlopCounterMode(display=False) as counter:
        conv_statistics(x, weight, padding=(1, 1))
    assert counter.get_total_flops() == 2 * 2 * 16 * 5 * 4 * 8 * 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 8, 4)}, "argument x: shape"),
        ({"weight": torch.zeros(4, 7, 3, 3)}, "argument weight: shape"),
        ({"weight": torch.zeros(4, 8, 9, 3)}, "argument weight: a filter of 9 x 3"),
        ({"stride": (0, 1)}, r"argument stride: \(0, 1\)"),
        ({"groups": 3}, "argument groups: 3"),
        ({"bias": torch.zeros(5)}, "argument bias: shape"),
        ({"weight": torch.zeros(4, 8, 3, 3, device="meta")}, "argument weight: on meta"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(2, 8, 4, 4), "weight": torch.zeros(4, 8, 3, 3)}
    with pytest.raises(ValueError, match=message):
        conv_statistics(**(given | arguments))


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_right_at_full_size(dtype: torch.dtype) -> None:
    x, weight, _ = convolution((32, 64, 56, 56), 64, (3, 3), dtype)
    y, partials = conv_statistics(x, weight, padding=(1, 1))
    require_close(y, F.conv2d(x.double(), weight.double(), padding=1), math_mode_of(dtype), 576)
    mean, rstd = batch_statistics(y, partials=partials)
    want_mean, want_rstd = batch_statistics_ref(y.double(), 1e-5)
    require_close(mean, want_mean, "ieee", 100_000)
    require_close(rstd, want_rstd, "ieee", 100_000)
