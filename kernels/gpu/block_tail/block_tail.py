"""The end of a bottleneck in one kernel, and optionally the start of the next one:

    h      = relu(conv3x3(x) + bias2)                  padding 1, stride 1 or 2
    y      = relu(conv1x1(h) + bias3 + residual)
    y_next = relu(conv1x1(y) + next_bias)              only with next_weight

x [N, C, H, W], weight2 [C, C, 3, 3], weight3 [K, C, 1, 1], residual and y [N, K, P, Q], next_weight
[D, K, 1, 1], y_next [N, D, P, Q], all NHWC in memory; C is 64, 128 or 256. h never goes to memory.

FLOPs: 2 N P Q (9 C C + C K + K D). Bytes, least: x, residual, y, y_next and the weights once each.
A 56x56 block of ResNet-50 moves 4.0 MB an image in 16 bits, and 6.4 MB as three kernels; those
layers are bound by memory, so that is where the gain must come from.

The kernel and its launch are block_tail_kernel.py's, its tiles block_tail_config.py's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resfuse.kernels.gpu.block_tail.block_tail_config import TailProblem, choose, supports
from resfuse.kernels.gpu.block_tail.block_tail_kernel import launch
from resfuse.kernels.gpu.common.arguments import (
    channels_last,
    empty_channels_last,
    require_4d,
    require_like,
)
from resfuse.kernels.gpu.common.gradient import conv_bn_act_backward
from resfuse.kernels.gpu.common.launch import multiprocessors, runs_triton
from resfuse.kernels.ops.conv_problem import Epilogue, Geometry, math_mode_of
from resfuse.kernels.tuning_cache.timing_cache import known

__all__ = ["TailProblem", "block_tail", "block_tail_ref", "problem_of", "supports"]


def block_tail_ref(
    x: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    residual: Tensor,
    next_weight: Tensor | None = None,
    next_bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification, in plain torch: y, or (y, y_next) with `next_weight`."""
    h = F.relu(F.conv2d(x, weight2, bias2.to(x.dtype), stride, padding=1))
    y = F.relu(F.conv2d(h, weight3, bias3.to(x.dtype)) + residual)
    if next_weight is None or next_bias is None:
        return y
    return y, F.relu(F.conv2d(y, next_weight, next_bias.to(x.dtype)))


def problem_of(x: Tensor, weight3: Tensor, next_weight: Tensor | None, stride: int) -> TailProblem:
    n, c, h, w = x.shape
    d = 0 if next_weight is None else next_weight.shape[0]
    return TailProblem(n, c, h, w, weight3.shape[0], d, stride, math_mode_of(x.dtype))


def _compute(
    x: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    residual: Tensor,
    stride: int,
    *chain: Tensor,
) -> tuple[Tensor, ...]:
    """y, and y_next if `chain` (next_weight, next_bias) is given; by the twin where no kernel
    runs."""
    if not runs_triton(x):
        made = block_tail_ref(
            x, weight2, bias2, weight3, bias3, residual, *chain, stride=(stride, stride)
        )
        return tuple(channels_last(t) for t in (made if isinstance(made, tuple) else (made,)))
    problem = problem_of(x, weight3, chain[0] if chain else None, stride)
    outputs = _outputs(x, weight3, stride, *chain)
    weights = channels_last(weight2), bias2.contiguous(), channels_last(weight3), bias3.contiguous()
    last = (channels_last(chain[0]), chain[1].contiguous(), outputs[1]) if chain else ()
    config = choose(problem, multiprocessors(x.device), known(x.device))
    launch(
        problem, config, channels_last(x), *weights, channels_last(residual), outputs[0], *last
    ).run()
    return outputs


def _outputs(x: Tensor, weight3: Tensor, stride: int, *chain: Tensor) -> tuple[Tensor, ...]:
    n, _, h, w = x.shape
    size = ((h - 1) // stride + 1, (w - 1) // stride + 1)
    makers = (weight3, chain[0]) if chain else (weight3,)
    return tuple(empty_channels_last((n, weight.shape[0], *size), x) for weight in makers)


@torch.library.custom_op("resfuse::block_tail", mutates_args=())
def _op(
    x: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    residual: Tensor,
    stride: int,
) -> Tensor:
    return _compute(x, weight2, bias2, weight3, bias3, residual, stride)[0]


@torch.library.custom_op("resfuse::block_tail_next", mutates_args=())
def _op_next(
    x: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    residual: Tensor,
    stride: int,
    next_weight: Tensor,
    next_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    y, y_next = _compute(
        x, weight2, bias2, weight3, bias3, residual, stride, next_weight, next_bias
    )
    return y, y_next


@_op.register_fake
def _(
    x: Tensor, weight2: Any, bias2: Any, weight3: Tensor, bias3: Any, residual: Any, stride: int
) -> Tensor:
    return _outputs(x, weight3, stride)[0]


@_op_next.register_fake
def _(
    x: Tensor,
    weight2: Any,
    bias2: Any,
    weight3: Tensor,
    bias3: Any,
    residual: Any,
    stride: int,
    next_weight: Tensor,
    next_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    y, y_next = _outputs(x, weight3, stride, next_weight, next_bias)
    return y, y_next


@register_flop_formula([torch.ops.resfuse.block_tail, torch.ops.resfuse.block_tail_next])
def _flops(
    x: Any, weight2: Any, bias2: Any, weight3: Any, bias3: Any, residual: Any, stride: int,
    next_weight: Any = None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    n, c, h, w = x
    d = 0 if next_weight is None else next_weight[0]
    return TailProblem(n, c, h, w, weight3[0], d, stride).flops


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.stride = inputs[:7]
    y = output[0] if isinstance(output, tuple) else output
    ctx.save_for_backward(*tensors, *inputs[7:], y)


def _backward(ctx: Any, grad_y: Tensor, grad_next: Any = None) -> tuple[Tensor | None, ...]:
    """Three convolutions backwards, from the last; h is computed again, y was kept."""
    x, weight2, bias2, weight3, bias3, residual, *chain, y = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of_chain: list[Tensor | None] = []
    if chain:
        next_weight, next_bias = chain
        into_y, *of_chain, _ = _conv_backward(
            grad_next, y, next_weight, next_bias, None, 1, (True, *needs[7:])
        )
        grad_y = grad_y + into_y
    h = F.relu(F.conv2d(x, weight2, bias2.to(x.dtype), ctx.stride, padding=1))
    grad_h, grad_weight3, grad_bias3, grad_residual = _conv_backward(
        grad_y, h, weight3, bias3, residual, 1, (True, *needs[3:5])
    )
    of_conv2 = _conv_backward(grad_h, x, weight2, bias2, None, ctx.stride, needs[:3])
    return *of_conv2[:3], grad_weight3, grad_bias3, grad_residual, None, *of_chain


def _conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: int,
    wanted: tuple[bool, ...],
) -> tuple[Any, ...]:
    """Gradients of x, weight, bias and residual for relu(conv(x) + bias + residual)."""
    padding = weight.shape[2] // 2
    geometry = Geometry((stride, stride), (padding, padding))
    epilogue = Epilogue.of("relu", residual is not None)
    given = grad, x, weight, bias.to(x.dtype), residual, None
    grad_x, grad_weight, grad_bias, grad_residual, _ = conv_bn_act_backward(
        *given, geometry, epilogue, wanted
    )
    if grad_bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return grad_x, grad_weight, grad_bias, grad_residual


_op.register_autograd(_backward, setup_context=_setup_context)
_op_next.register_autograd(_backward, setup_context=_setup_context)


def block_tail(
    x: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    residual: Tensor,
    next_weight: Tensor | None = None,
    next_bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
) -> Tensor | tuple[Tensor, Tensor]:
    """The 3x3 and the 1x1 that end a bottleneck, and with `next_weight` the next block's first 1x1.

    Batch norms are folded into the weights and biases already.

    Args:
        x: [N, C, H, W], the output of the block's first 1x1; C is 64, 128 or 256.
        weight2, bias2: of the 3x3, [C, C, 3, 3] and [C].
        weight3, bias3: of the 1x1, [K, C, 1, 1] and [K]; K is a multiple of 64.
        residual: [N, K, P, Q], the shortcut.
        next_weight, next_bias: [D, K, 1, 1] and [D]; D is C or 2 C, up to 256.
        stride: of the 3x3, (1, 1) or (2, 2).

    Returns:
        y [N, K, P, Q], or (y, y_next) with y_next [N, D, P, Q]; channels_last.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; or the kernel cannot hold the channels,
            which `supports(problem_of(...))` says beforehand.
    """
    if tuple(stride) not in ((1, 1), (2, 2)):
        raise ValueError(f"argument stride: {tuple(stride)}; accepted: (1, 1), (2, 2)")
    if (next_weight is None) != (next_bias is None):
        raise ValueError("argument next_bias: accepted: given exactly if next_weight is")
    for name, tensor in (("x", x), ("weight3", weight3), ("next_weight", next_weight)):
        if tensor is not None:
            require_4d(name, tensor)
    problem = problem_of(x, weight3, next_weight, stride[0])
    n, c, k, d = problem.n, problem.c, problem.k, problem.d
    require_like("weight2", weight2, (c, c, 3, 3), x)
    require_like("bias2", bias2, (c,), x, or_fp32=True)
    require_like("weight3", weight3, (k, c, 1, 1), x)
    require_like("bias3", bias3, (k,), x, or_fp32=True)
    require_like("residual", residual, (n, k, problem.p, problem.q), x)
    require_like("next_weight", next_weight, (d, k, 1, 1), x)
    require_like("next_bias", next_bias, (d,), x, or_fp32=True)
    choose(problem, 1)  # raises where the kernel cannot do it, whichever device x is on
    if next_weight is None or next_bias is None:
        y: Tensor = _op(x, weight2, bias2, weight3, bias3, residual, stride[0])
        return y
    pair: tuple[Tensor, Tensor] = _op_next(
        x, weight2, bias2, weight3, bias3, residual, stride[0], next_weight, next_bias
    )
    return pair
