"""Trials of kernels on quantised values: their answers are integers, and compared as such."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from resfuse.bench.layers.kernel_check.trial import Place, Trial
from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.gpu.conv import conv_config
from resfuse.kernels.gpu.conv1x1 import conv1x1_config
from resfuse.kernels.gpu.conv_int8 import conv1x1_int8_kernel, conv_int8_kernel
from resfuse.kernels.gpu.conv_int8.conv_int8 import conv_int8_ref
from resfuse.kernels.gpu.int8_maps import convert, pool
from resfuse.kernels.gpu.int8_maps.pool import PoolProblem
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of
from resfuse.kernels.ops.quantization import Quantization, Requantization

_STORED, _OUTPUT = Quantization(0.02, 3), Quantization(0.02, 0)


def conv_int8(place: Place) -> Iterator[Trial]:
    """Every configuration of both kernels, on a convolution of ResNet-50 that has it."""
    problems = [p for p in conv_int8_kernel.resnet50_problems() if p.n == 32]
    if place.small:
        same = Geometry(padding=(1, 1))
        tiny = ConvProblem(1, 16, 5, 7, 24, 3, 3, same, dtypes=dtypes_of("int8"))
        added = Epilogue("relu", "before")
        problems = [tiny, replace(tiny, k=32, r=1, s=1, geometry=Geometry(), epilogue=added)]
    usable = {problem: conv_config.candidates(problem) for problem in problems}
    for config in place.some(c for c in conv_config.INT8 if _any(c, usable)):
        problem = next(problem for problem in problems if config in usable[problem])
        yield _trial(place, problem, config, partial(conv_int8_kernel.launch, config=config))
    pointwise = [conv1x1_config.gemm_of(p) for p in problems if p.r == 1 and p.residual]
    tiles = {problem: conv1x1_config.candidates(problem) for problem in pointwise}
    for tile in place.some(c for c in conv1x1_config.INT8 if _any(c, tiles)):
        gemm = next(problem for problem in pointwise if tile in tiles[problem])
        yield _trial(place, gemm, tile, partial(conv1x1_int8_kernel.launch, config=tile))


def convert_int8(place: Place) -> Iterator[Trial]:
    """Every configuration, on images that become integers."""
    shape = (1, 3, 5, 7) if place.small else (32, 3, 224, 224)
    x = _bytes(place, shape).float() / 100
    for config in place.some(convert.CONFIGS):
        y = torch.full_like(_bytes(place, shape), 99)
        made = convert.launch(x, y, _STORED, config)
        exact = partial(_converted, place, shape)
        yield Trial(
            f"{'x'.join(map(str, shape))} {config.label()}", "int8", config, 1, made, (y,), exact
        )


def pool_int8(place: Place) -> Iterator[Trial]:
    """Every configuration, on the largest values of windows; the last on means of whole maps."""
    stem = PoolProblem(32, 64, 112, 112, 56, 56, (3, 3), (2, 2), (1, 1))
    last = PoolProblem(32, 2048, 7, 7, 1, 1, (7, 7), (1, 1), (0, 0))
    if place.small:
        stem, last = replace(stem, n=1, c=24, h=8, w=6, p=4, q=3), replace(last, n=1, c=300)
    for config in place.some(pool.CONFIGS):
        means = config not in pool.candidates(stem)
        problem = last if means else stem
        x = _bytes(place, problem.input_shape)
        y = torch.full_like(_bytes(place, problem.output_shape), 99)
        how = (_divisors(place), _STORED, _OUTPUT) if means else ()
        made = pool.launch(problem, x, y, config, *how)
        label = f"{'mean' if means else 'max'} {problem.label()} {config.label()}"
        yield Trial(label, "int8", config, 1, made, (y,), partial(_pooled, place, problem, means))


def _divisors(place: Place) -> Tensor:
    return torch.full((1, 1), 49.0, device=place.device)


def _converted(place: Place, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return (convert.convert_int8_ref(_bytes(place, shape).float() / 100, _STORED).double(),)


def _pooled(place: Place, problem: PoolProblem, means: bool) -> tuple[Tensor, ...]:
    how = (_divisors(place), _STORED, _OUTPUT) if means else ()
    return (pool.pool_int8_ref(_bytes(place, problem.input_shape), problem, *how).double(),)


def _any(config: object, usable: Mapping[Any, Sequence[object]]) -> bool:
    return any(config in configs for configs in usable.values())


def _trial(place: Place, problem: ConvProblem, config: Any, launch: Callable[..., Launch]) -> Trial:
    x, weight, how, residual = _operands(place, problem)
    y = torch.full_like(_bytes(place, problem.output_shape), 99)
    table = conv_int8_kernel.offsets(weight, _STORED, problem.geometry)
    tensors = conv_int8_kernel.Tensors(x, weight, table, how.scale, how.bias, residual, None, y)
    stored = None if residual is None else _STORED
    made = launch(problem, tensors, residual=stored, output=_OUTPUT)
    label = f"{problem.label()} {config.label()}"
    # Of reduction 1, since sums have no roundings.
    return Trial(label, "int8", config, 1, made, (y,), partial(_exact, place, problem))


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
