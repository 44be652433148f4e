"""Trials of the kernels a training step runs on: forward and backward, each launch by itself."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.bench.layers.kernel_check.trial import Place, Trial
from resfuse.kernels.gpu.batch_norm import bn_add_relu_kernel as bn
from resfuse.kernels.gpu.batch_norm import bn_conv1x1 as prologue
from resfuse.kernels.gpu.batch_norm import conv_statistics as conv
from resfuse.kernels.gpu.batch_norm.batch_norm_config import DISTINCT
from resfuse.kernels.gpu.batch_norm.batch_statistics_kernel import (
    Partials,
    launch_partials,
    problem_of,
)
from resfuse.kernels.gpu.batch_norm.bn_add_relu_kernel import Normed
from resfuse.kernels.gpu.conv.conv_arguments import Tensors
from resfuse.kernels.gpu.conv.conv_config import BY_MATH_MODE, resnet_problems
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of


def _shape(place: Place) -> tuple[int, int, int, int]:
    return (2, 24, 5, 7) if place.small else (32, 256, 28, 28)


def statistics(place: Place) -> Iterator[Trial]:
    """Means and squared deviations of the parts of a batch."""
    if place.math_mode == "tf32":  # nothing is multiplied by a tensor core
        return
    x = place.draw(*_shape(place))
    for config in place.some(DISTINCT):
        partials = _partials(place, config.grid(problem_of(x))[0], x.shape[1])
        made = launch_partials(x, partials, config)

        @cache
        def exact(rows: int = config.rows) -> tuple[Tensor, ...]:
            return _parts(x, rows)

        label = f"{'x'.join(map(str, x.shape))} {config.label()}"
        yield Trial(label, place.math_mode, config, config.rows, made, partials, exact)


def _parts(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Returns the Partials of x by parts of so many pixels, in fp64."""
    parts = x.double().permute(0, 2, 3, 1).flatten(0, 2).split(rows)
    found = []
    for part in parts:
        var, mean = torch.var_mean(part, 0, correction=0)
        found.append(torch.stack([mean, var * len(part)]))
    counts = torch.tensor([len(part) for part in parts], dtype=torch.float64, device=x.device)
    return torch.stack(found, 1), counts


def _partials(place: Place, parts: int, channels: int) -> Partials:
    return Partials(_vectors(place, 2, parts, channels), _vectors(place, parts))


def bn_add_relu(place: Place) -> Iterator[Trial]:
    """Forward pass, sums and backward pass of a block's join with a projection."""
    if place.math_mode == "tf32":
        return
    shape = _shape(place)
    x, x2, grad = (place.draw(*shape, seed=seed) for seed in range(3))
    vectors = [place.draw(shape[1], seed=seed).float() for seed in range(8)]
    rstd, rstd2 = (vectors[i].abs() + 0.5 for i in (1, 5))
    main = Normed(x, vectors[0], rstd, vectors[2], vectors[3], batch=True)
    side = Normed(x2, vectors[4], rstd2, vectors[6], vectors[7], batch=True)
    y = place.draw(*shape, seed=3).relu()
    grads = torch.stack(vectors[:3])
    forward = cache(lambda: (_forward(main, side),))
    backward = cache(lambda: (_grad(grad, y, main, grads, 1), _grad(grad, y, side, grads, 2)))
    for config in place.some(DISTINCT):
        label = f"{'x'.join(map(str, shape))} {config.label()}"
        z = place.blank(*shape)
        made = bn.launch_forward(z, main, shortcut=side, config=config)
        yield Trial(f"forward {label}", place.math_mode, config, 4, made, (z,), forward)

        sums = _vectors(place, 3, config.grid(problem_of(x))[0], shape[1])
        made = bn.launch_reduce(sums, grad, y, main, side, config)

        @cache
        def reduced(rows: int = config.rows) -> tuple[Tensor, ...]:
            return (_sums(grad, y, main, side, rows),)

        yield Trial(f"reduce {label}", place.math_mode, config, config.rows, made, (sums,), reduced)

        outputs = place.blank(*shape), place.blank(*shape)
        made = bn.launch_backward(*outputs, grads, grad, y, main, side, config)
        yield Trial(f"backward {label}", place.math_mode, config, 4, made, outputs, backward)


def _forward(main: Normed, side: Normed) -> Tensor:
    first, second = (_hat(n) * _wide(n.weight) + _wide(n.bias) for n in (main, side))
    return (first + second).relu()


def _sums(grad: Tensor, y: Tensor, main: Normed, side: Normed, rows: int) -> Tensor:
    g = torch.where(y <= 0, 0.0, grad.double())
    centred = [n.x.double() - _wide(n.mean) for n in (main, side)]
    terms = torch.stack([g, *(g * each for each in centred)])
    pixels = terms.permute(0, 1, 3, 4, 2).flatten(1, 3)
    return torch.stack([part.sum(1) for part in pixels.split(rows, 1)], 1)


def _grad(grad: Tensor, y: Tensor, normed: Normed, grads: Tensor, row: int) -> Tensor:
    g = torch.where(y <= 0, 0.0, grad.double())
    count = g.numel() // g.shape[1]
    level = (_wide(grads[0]) + _hat(normed) * _wide(grads[row])) / count
    return (g - level) * _wide(normed.rstd) * _wide(normed.weight)


def _hat(normed: Normed) -> Tensor:
    return (normed.x.double() - _wide(normed.mean)) * _wide(normed.rstd)


def _wide(vector: Tensor | None) -> Tensor:
    assert vector is not None
    return vector.double()[:, None, None]


def conv_statistics(place: Place) -> Iterator[Trial]:
    """Yields trials of a convolution and the statistics of its output, tile by tile."""
    problems = [p for p in resnet_problems(place.math_mode) if p.n == 32]
    if place.small:
        problems = [ConvProblem(1, 16, 5, 7, 24, 3, 3, Geometry(padding=(1, 1)))]
    dtypes = dtypes_of(place.math_mode)
    problems = [replace(problem, epilogue=Epilogue(), dtypes=dtypes) for problem in problems]
    usable = {problem: conv.candidates(problem) for problem in problems}
    configs = (c for c in BY_MATH_MODE[place.math_mode] if any(c in u for u in usable.values()))
    for config in place.some(configs):
        problem = next(problem for problem in problems if config in usable[problem])
        c = problem.c // problem.groups
        fan_in = c * problem.r * problem.s
        x = place.draw(problem.n, problem.c, problem.h, problem.w)
        weight = place.draw(problem.k, c, problem.r, problem.s, fan_in=fan_in)
        y = place.blank(problem.n, problem.k, problem.p, problem.q)
        partials = _partials(place, config.tiles(problem)[0], problem.k)
        made = conv.launch(problem, Tensors(x, weight, None, None, None, y), partials, config)

        @cache
        def exact(
            problem: ConvProblem = problem, operands: tuple[Tensor, Tensor] = (x, weight),
            rows: int = config.block_m,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            x, weight = (t.double() for t in operands)
            y = F.conv2d(x, weight, None, *problem.geometry)
            return y, *_parts(y, rows)

        label = f"{problem.label()} {config.label()}"
        yield Trial(label, place.math_mode, config, fan_in, made, (y, *partials), exact)


def bn_conv1x1(place: Place) -> Iterator[Trial]:
    """Yields trials of a 1x1 convolution of an image normalised on the way, with the statistics of
    its output."""
    n, c, hw, k = (1, 16, 5, 24) if place.small else (32, 64, 28, 256)
    x, filters = place.draw(n, c, hw, hw), place.draw(k, c, 1, 1, fan_in=c)
    mean, scale, weight, bias = (place.draw(c, seed=seed).float() for seed in range(4))
    rstd = scale.abs() + 0.5
    main = Normed(x, mean, rstd, weight, bias, batch=True)
    problem = prologue.problem_of(x, filters, place.math_mode)
    for config in place.some(prologue.candidates(problem)):
        y, partials = place.blank(n, k, hw, hw), _partials(place, config.tiles(problem)[0], k)
        made = prologue.launch(
            y, partials, x, (mean, rstd, weight, bias), filters, config, math_mode=place.math_mode
        )

        @cache
        def exact(rows: int = config.block_m) -> tuple[Tensor, ...]:
            h = (_hat(main) * _wide(weight) + _wide(bias)).relu()
            y = F.conv2d(h, filters.double())
            return y, *_parts(y, rows)

        label = f"{problem.label()} {config.label()}"
        yield Trial(label, place.math_mode, config, 4 * c, made, (y, *partials), exact)


def _vectors(place: Place, *shape: int) -> Tensor:
    return torch.full(shape, float("nan"), device=place.device)
