"""TRIALS: every configuration of every kernel, on a problem of a ResNet it must get right; of
those that `trials_of` yields, the math mode is one that the kernel computes in.

Problems are those `shipped` compiles, at a smaller batch; `small` ones, for Triton's interpreter,
are tiny, and one configuration stands for all of its math mode.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

from torch import Tensor

from resfuse.bench.layers.kernel_check.quantized_trials import (
    conv_int8,
    convert_int8,
    pool_int8,
)
from resfuse.bench.layers.kernel_check.training_trials import (
    bn_add_relu,
    bn_conv1x1,
    conv_statistics,
    statistics,
)
from resfuse.bench.layers.kernel_check.trial import Place, Trial
from resfuse.kernels.gpu.block_tail import block_tail_config, block_tail_kernel
from resfuse.kernels.gpu.block_tail.block_tail import block_tail_ref
from resfuse.kernels.gpu.block_tail.block_tail_config import TailProblem
from resfuse.kernels.gpu.bn_act import bn_act
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.gpu.conv import conv, depthwise
from resfuse.kernels.gpu.conv.conv_arguments import Tensors
from resfuse.kernels.gpu.conv.conv_config import BY_MATH_MODE, candidates, resnet_problems
from resfuse.kernels.gpu.conv1x1 import conv1x1_config, conv1x1_kernel
from resfuse.kernels.gpu.conv1x1.conv1x1 import Shortcut, conv1x1_ref
from resfuse.kernels.gpu.split_k import split_k, split_k_config
from resfuse.kernels.gpu.stem import stem, stem_config, stem_kernel
from resfuse.kernels.ops.conv_problem import (
    QUANTIZED_MODES,
    ConvProblem,
    Epilogue,
    Geometry,
    dtypes_of,
)

__all__ = ["TRIALS", "Place", "Trial", "trials_of"]


_SAME = Geometry(padding=(1, 1))  # of a 3x3 whose output is as large as its input


def _conv(place: Place) -> Iterator[Trial]:
    dtypes = dtypes_of(place.math_mode)
    problems = [p for p in resnet_problems(place.math_mode) if p.n == 32]
    if place.small:
        problems = [ConvProblem(1, 16, 5, 7, 24, 3, 3, _SAME, dtypes=dtypes)]
    usable = {problem: candidates(problem) for problem in problems}
    for config in place.some(c for c in BY_MATH_MODE[place.math_mode] if _any(c, usable)):
        problem = next(problem for problem in problems if config in usable[problem])
        launch = partial(conv.launch, config=config)
        yield _convolution(place, problem, config.label(), config, launch)
    size = 5 if place.small else 28
    n, geometry = 1 if place.small else 32, _SAME._replace(groups=128)
    deep = ConvProblem(n, 128, size, size, 128, 3, 3, geometry, dtypes=dtypes)
    for own in place.some(depthwise.candidates(deep)):
        label = f"depthwise {own.block_m}x{own.block_n}"
        yield _convolution(place, deep, label, own, partial(depthwise.launch, config=own))


def _split_k(place: Place) -> Iterator[Trial]:
    problems = [p for p in resnet_problems(place.math_mode) if p.n == 1 and p.groups == 1]
    if place.small:
        dtypes = dtypes_of(place.math_mode)
        problems = [ConvProblem(1, 128, 3, 5, 16, 3, 3, _SAME, dtypes=dtypes)]
    seen = set()
    for problem in problems:
        found = split_k_config.candidates(problem)
        for config in place.some(c for c in found if c.splits > 1 and c not in seen):
            seen.add(config)
            scratch = split_k.workspace(problem, config, place.device)
            launch = partial(split_k.launch, config=config, scratch=scratch)
            yield _convolution(place, problem, config.label(), config, launch)


def _convolution(
    place: Place, problem: ConvProblem, label: str, config: Any, launch: Callable[..., Launch]
) -> Trial:
    x, weight, bias = _operands(place, problem)
    y = place.blank(*problem.output_shape)
    made = launch(problem, Tensors(x, weight, bias, None, None, y))
    named = f"{problem.label()} {label}"
    return Trial(named, place.math_mode, config, weight[0].numel(), made, (y,),
                 partial(_exact_convolution, place, problem))  # fmt: skip


def _operands(place: Place, problem: ConvProblem) -> tuple[Tensor, Tensor, Tensor]:
    k, *window = problem.weight_shape
    return (
        place.draw(*problem.input_shape),
        place.draw(k, *window, fan_in=math.prod(window)),
        place.draw(k),
    )


@cache
def _exact_convolution(place: Place, problem: ConvProblem) -> tuple[Tensor, ...]:
    x, weight, bias = (t.double() for t in _operands(place, problem))
    window = problem.geometry._asdict()
    return (conv.conv_bn_act_ref(x, weight, bias, **window, activation=problem.activation),)


def _conv1x1(place: Place) -> Iterator[Trial]:
    n, c, hw, k = (1, 16, 5, 32) if place.small else (8, 256, 28, 512)
    x, weight, bias = place.draw(n, c, hw, hw), place.draw(k, c, 1, 1, fan_in=c), place.draw(k)
    residual = place.draw(n, k, hw, hw)
    side = place.draw(n, 2 * c, 2 * hw, 2 * hw), place.draw(k, 2 * c, 1, 1, fan_in=2 * c)
    problem = ConvProblem(n, c, hw, hw, k, 1, 1, epilogue=Epilogue("relu", "before"),
                          dtypes=dtypes_of(place.math_mode))  # fmt: skip
    configs = conv1x1_config.candidates(conv1x1_config.gemm_of(problem))
    for folded in (False, True):
        shortcut = Shortcut(*side, (2, 2)) if folded else None
        wide = Shortcut(side[0].double(), side[1].double(), (2, 2)) if folded else None

        @cache
        def exact(wide: Shortcut | None = wide) -> tuple[Tensor, ...]:
            operands = (t.double() for t in (x, weight, bias, residual))
            return (conv1x1_ref(*operands, activation="relu", shortcut=wide),)

        for config in place.some(configs):
            y = place.blank(n, k, hw, hw)
            tensors = Tensors(x, weight, bias, residual, None, y)
            made = conv1x1_kernel.launch(problem, tensors, config, shortcut)
            label = f"{problem.label()}{' + projection' if folded else ''} {config.label()}"
            yield Trial(label, place.math_mode, config, 3 * c if folded else c, made, (y,), exact)


def _stem(place: Place) -> Iterator[Trial]:
    n, hw = (1, 12) if place.small else (8, 224)
    x, weight, bias = place.draw(n, 3, hw, hw), place.draw(64, 3, 7, 7, fan_in=147), place.draw(64)
    problem = stem_config.StemProblem(n, 3, hw, hw, 64, place.math_mode)
    exact = cache(lambda: (stem.stem_ref(x.double(), weight.double(), bias.double()),))
    for config in place.some(stem_config.candidates(problem)):
        y = place.blank(n, 64, problem.p2, problem.q2)
        packed = stem.pack_weight(weight)
        made = stem_kernel.launch(
            y, x, packed, bias, math_mode=place.math_mode, config=config
        )  # fmt: skip
        label = f"{n}x3x{hw}x{hw} k64 {config.label()} w{config.num_warps}"
        yield Trial(label, place.math_mode, config, 147, made, (y,), exact)


def _bn_act(place: Place) -> Iterator[Trial]:
    if place.math_mode == "tf32":  # nothing is multiplied by a tensor core
        return
    shape = (1, 24, 5, 7) if place.small else (32, 256, 56, 56)
    x, residual = (place.draw(*shape, seed=seed) for seed in range(2))
    scale, shift = (place.draw(shape[1], seed=seed) for seed in range(2))
    exact = cache(lambda: (bn_act.bn_act_ref(*(t.double() for t in (x, scale, shift, residual))),))
    for config in place.some(bn_act.CONFIGS):
        y = place.blank(*shape)
        made = bn_act.launch(y, x, scale, shift, residual, config=config)
        label = f"{'x'.join(map(str, shape))} block {config.block}"
        yield Trial(label, place.math_mode, config, 1, made, (y,), exact)


def _block_tail(place: Place) -> Iterator[Trial]:
    tiles = block_tail_config.TILES.get(place.math_mode, {})
    for (c, d), configs in place.some(tiles.items()):
        size = 56 * 64 // c
        problem = TailProblem(8, c, size, size, 4 * c, d, 1, place.math_mode)
        if place.small:
            problem = replace(problem, n=1, h=3, w=5, k=128)
        given = _tail_arguments(place, problem)
        exact = cache(partial(_exact_tail, given))
        for config in place.some(configs):
            outputs = tuple(
                place.blank(problem.n, channels, problem.p, problem.q)
                for channels in ((problem.k, d) if d else (problem.k,))
            )
            filled: dict[str, Any] = dict(zip(("y", "y_next"), outputs, strict=False))
            made = block_tail_kernel.launch(problem, config, **given, **filled)
            label = f"{problem.label()}: {config.label()}"
            yield Trial(label, place.math_mode, config, 9 * c, made, outputs, exact)


def _tail_arguments(place: Place, problem: TailProblem) -> dict[str, Tensor]:
    n, c, k, d = problem.n, problem.c, problem.k, problem.d
    given = {
        "x": place.draw(n, c, problem.h, problem.w),
        "weight2": place.draw(c, c, 3, 3, fan_in=9 * c),
        "bias2": place.draw(c),
        "weight3": place.draw(k, c, 1, 1, fan_in=c),
        "bias3": place.draw(k),
        "residual": place.draw(n, k, problem.p, problem.q),
    }
    chain = {"next_weight": place.draw(d, k, 1, 1, fan_in=k), "next_bias": place.draw(d, seed=1)}
    return given | (chain if d else {})


def _exact_tail(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    wide: dict[str, Any] = {name: tensor.double() for name, tensor in given.items()}
    made = block_tail_ref(**wide)
    return made if isinstance(made, tuple) else (made,)


def _any(config: object, usable: dict[ConvProblem, list[Any]]) -> bool:
    return any(config in configs for configs in usable.values())


TRIALS: dict[str, Callable[[Place], Iterator[Trial]]] = {
    "conv_bn_act": _conv,
    "conv_bn_act_split_k": _split_k,
    "conv_int8": conv_int8,
    "convert_int8": convert_int8,
    "pool_int8": pool_int8,
    "conv1x1": _conv1x1,
    "stem": _stem,
    "bn_act": _bn_act,
    "block_tail": _block_tail,
    "batch_statistics": statistics,
    "bn_add_relu": bn_add_relu,
    "conv_statistics": conv_statistics,
    "bn_conv1x1": bn_conv1x1,
}


_IN_INT8 = ("conv_int8", "convert_int8", "pool_int8")


def trials_of(kernel: str, place: Place) -> Iterator[Trial]:
    """Yields a kernel's trials in the place's math mode, if it computes in that."""
    if (kernel in _IN_INT8) == (place.math_mode in QUANTIZED_MODES):
        yield from TRIALS[kernel](place)
