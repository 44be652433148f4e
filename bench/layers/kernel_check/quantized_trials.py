"""Trials of the convolution of quantised values: its answers are integers, and compared as such."""

from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor

from resfuse.bench.layers.kernel_check.trial import Place, Trial
from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.gpu.conv.conv_config import INT8, candidates
from resfuse.kernels.gpu.conv_int8 import conv_int8_kernel
from resfuse.kernels.gpu.conv_int8.conv_int8 import conv_int8_ref
from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry, dtypes_of
from resfuse.kernels.ops.quantization import Quantization, Requantization

_STORED, _OUTPUT = Quantization(0.02, 3), Quantization(0.02, 0)


def conv_int8(place: Place) -> Iterator[Trial]:
    """Every configuration, on a convolution of ResNet-50 that has it; residuals too."""
    problems = [p for p in conv_int8_kernel.resnet50_problems() if p.n == 32]
    if place.small:
        same = Geometry(padding=(1, 1))
        problems = [ConvProblem(1, 16, 5, 7, 24, 3, 3, same, dtypes=dtypes_of("int8"))]
    usable = {problem: candidates(problem) for problem in problems}
    for config in place.some(c for c in INT8 if any(c in u for u in usable.values())):
        problem = next(problem for problem in problems if config in usable[problem])
        given = _operands(place, problem)
        y = torch.full_like(_bytes(place, problem.output_shape), 99)
        table = conv_int8_kernel.offsets(given[1], _STORED, problem.geometry)
        x, weight, how, residual = given
        tensors = conv_int8_kernel.Tensors(x, weight, table, how.scale, how.bias, residual, None, y)
        stored = None if residual is None else _STORED
        made = conv_int8_kernel.launch(problem, tensors, config, stored, _OUTPUT)
        label = f"{problem.label()} {config.label()}"
        # Of reduction 1, since sums have no roundings.
        yield Trial(label, "int8", config, 1, made, (y,), partial(_exact, place, problem))


@cache
def _exact(place: Place, problem: ConvProblem) -> tuple[Tensor, ...]:
    x, weight, how, residual = _operands(place, problem)
    given = x, weight, how, _STORED, _OUTPUT, problem.geometry, problem.activation, None
    stored = None if residual is None else _STORED
    return (conv_int8_ref(*given, residual, stored, problem.epilogue.residual_last).double(),)


def _operands(
    place: Place, problem: ConvProblem
) -> tuple[Tensor, Tensor, Requantization, Tensor | None]:
    """Returns x, weight, how and the residual; sums come to numbers of about one."""
    weight = _bytes(place, problem.weight_shape)
    gain = 1 / (74 * 74 * weight[0].numel() ** 0.5)  # 74: of an integer drawn
    scale = torch.full((problem.k,), gain, device=place.device)
    how = Requantization(scale, torch.zeros_like(scale), scale.new_empty(0))
    residual = _bytes(place, problem.output_shape) if problem.residual else None
    return _bytes(place, problem.input_shape), weight, how, residual


def _bytes(place: Place, shape: tuple[int, ...]) -> Tensor:
    """Returns integers of -127 to 127, the same for the same shape."""
    if place.device == "meta":
        return channels_last(torch.empty(shape, dtype=torch.int8, device="meta"))
    generator = torch.Generator(place.device).manual_seed(sum(shape))
    drawn = torch.randint(-127, 128, shape, generator=generator, device=place.device)
    return channels_last(drawn.to(torch.int8))
