"""y = act(W x + W_d x_d[:, :, ::s, ::s] + bias + residual): a 1x1 convolution as one GEMM.

x [N, C, H, W], w [K, C, 1, 1] -> y [N, K, P, Q], all NHWC in memory. The projection shortcut
W_d x_d of the block that changes resolution is folded in as more of the reduction,
[x, x_d] @ [W; W_d], and so never goes to memory. Bias, residual and activation work on the fp32
accumulator.

FLOPs: 2 * N*P*Q * K * (C + C_d). Bytes: every tensor once. Folding saves a write and a read of y:
2 * N*P*Q * K elements, 822 MB in stage 1 of ResNet-50 at batch 256 in 16 bits.

The kernel and its launch are conv1x1_kernel.py's, its tiles conv1x1_config.py's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resfuse.kernels.gpu.common.arguments import (
    channels_last,
    empty_channels_last,
    require_4d,
    require_like,
)
from resfuse.kernels.gpu.common.gradient import conv_bn_act_backward, convolution_backward
from resfuse.kernels.gpu.common.launch import Launch, runs_triton
from resfuse.kernels.gpu.conv.conv_arguments import Tensors, problem_of
from resfuse.kernels.gpu.conv1x1.conv1x1_kernel import Shortcut, launch
from resfuse.kernels.ops.activation import ACTIVATIONS, Slope, require_activation
from resfuse.kernels.ops.conv_problem import Epilogue, Geometry, Pair

__all__ = ["Shortcut", "conv1x1", "conv1x1_ref"]


def conv1x1_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    activation: str = "identity",
    slope: Slope = None,
    residual_last: bool = False,
    shortcut: Shortcut | None = None,
) -> Tensor:
    """`conv1x1` in plain torch, in any dtype: the specification."""
    z = F.conv2d(x, weight, stride=stride)
    if shortcut is not None:
        z = z + F.conv2d(shortcut.x, shortcut.weight, stride=shortcut.stride)
    if bias is not None:
        z = z + bias[:, None, None]
    if residual is not None and not residual_last:
        z = z + residual
    y = ACTIVATIONS[activation].forward(z, slope)
    if residual is not None and residual_last:
        y = y + residual
    return y.to(x.dtype)


@torch.library.custom_op("resfuse::conv1x1", mutates_args=())
def conv1x1_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    stride: list[int],
    x2: Tensor | None,
    weight2: Tensor | None,
    stride2: list[int],
    activation: str,
    negative_slope: float,
    residual_last: bool,
) -> Tensor:
    """`conv1x1` with a number's slope in `negative_slope`, a tensor's in `slope`; on channels_last
    copies of what is not channels_last already."""
    x, weight = channels_last(x), channels_last(weight)
    shortcut = None
    if x2 is not None and weight2 is not None:
        shortcut = Shortcut(channels_last(x2), channels_last(weight2), (stride2[0], stride2[1]))
    if residual is not None:
        residual = channels_last(residual)
    bias = bias.contiguous() if bias is not None else None
    either: Slope = slope.contiguous() if slope is not None else negative_slope
    at = (stride[0], stride[1])
    if not runs_triton(x):
        y = conv1x1_ref(
            x,
            weight,
            bias,
            residual,
            stride=at,
            activation=activation,
            slope=either,
            residual_last=residual_last,
            shortcut=shortcut,
        )
        return channels_last(y)
    y = empty_channels_last(_output_shape(x.shape, weight.shape, stride), x)
    if y.numel():
        epilogue = Epilogue.of(activation, residual is not None, residual_last)
        problem = problem_of(x, weight, Geometry(at), epilogue)
        tensors = Tensors(x, weight, bias, residual, either, y)
        launch(problem, tensors, shortcut=shortcut).run()
    return y


def _output_shape(x: Any, weight: Any, stride: Any) -> list[int]:
    """[N, K, P, Q] from the shapes of x and weight."""
    return [x[0], weight[0], (x[2] - 1) // stride[0] + 1, (x[3] - 1) // stride[1] + 1]


@conv1x1_op.register_fake
def _fake(
    x: Tensor, weight: Tensor, bias: Any, residual: Any, slope: Any, stride: list[int], *_: Any
) -> Tensor:
    return empty_channels_last(_output_shape(x.shape, weight.shape, stride), x)


@register_flop_formula(torch.ops.resfuse.conv1x1)
def _flops(x: Any, weight: Any, *flat: Any, out_shape: Any = None, **__: Any) -> int:
    _, _, _, stride, x2, *_ = flat
    n, k, p, q = _output_shape(x, weight, stride)
    return 2 * n * p * q * k * (x[1] + (x2[1] if x2 is not None else 0))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, slope, stride, x2, weight2, stride2, *rest = inputs
    ctx.save_for_backward(x, weight, bias, residual, slope, x2, weight2)
    ctx.stride, ctx.stride2 = stride, stride2
    ctx.activation, ctx.negative_slope, ctx.residual_last = rest


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, slope, x2, weight2 = ctx.saved_tensors
    needs = ctx.needs_input_grad
    # All that enters the activation beside W x + bias: a residual the activation also sees.
    seen = None if ctx.residual_last else residual
    if x2 is not None:
        projected = F.conv2d(x2, weight2, stride=ctx.stride2)
        seen = projected if seen is None else seen + projected
    geometry, epilogue = Geometry(ctx.stride), Epilogue.of(ctx.activation, seen is not None)
    either = ctx.negative_slope if slope is None else slope
    given = grad, x, weight, None if bias is None else bias.to(x.dtype), seen, either
    grad_x, grad_weight, grad_bias, grad_z, grad_slope = conv_bn_act_backward(
        *given, geometry, epilogue, needs[:3]
    )
    grad_x2, grad_weight2 = None, None
    if x2 is not None and (needs[6] or needs[7]):
        wanted = needs[6], needs[7], False
        grad_x2, grad_weight2, _ = convolution_backward(
            grad_z, x2, weight2, Geometry(ctx.stride2), wanted
        )
    return (
        grad_x,
        grad_weight,
        grad_bias.to(bias.dtype) if grad_bias is not None and bias is not None else None,
        (grad if ctx.residual_last else grad_z) if needs[3] else None,
        grad_slope.sum((0, 2, 3)).to(slope.dtype) if needs[4] else None,
        None,
        grad_x2,
        grad_weight2,
        *(None,) * 4,
    )


conv1x1_op.register_autograd(_backward, setup_context=_setup_context)


def _require_convolution(prefix: str, x: Tensor, weight: Tensor, stride: Pair) -> list[int]:
    """The shape of y; raises ValueError unless these make a 1x1 convolution."""
    require_4d(f"{prefix}x", x)
    require_4d(f"{prefix}weight", weight)
    require_like(f"{prefix}weight", weight, (weight.shape[0], x.shape[1], 1, 1), x)
    if len(stride) != 2 or min(stride) < 1:
        raise ValueError(f"argument {prefix}stride: {stride}; accepted: two positive numbers")
    return _output_shape(x.shape, weight.shape, stride)


def require_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Slope,
    stride: Pair,
    epilogue: Epilogue,
    shortcut: Shortcut | None,
) -> list[int]:
    """The shape of y; raises ValueError naming the argument that `conv1x1` cannot take."""
    assert (residual is not None) == (epilogue.residual != "none")
    shape = _require_convolution("", x, weight, stride)
    require_activation(epilogue.activation, slope, shape[1])
    require_like("bias", bias, shape[1:2], x, or_fp32=True)
    require_like("residual", residual, shape, x)
    if shortcut is not None:
        made = _require_convolution("shortcut.", shortcut.x, shortcut.weight, shortcut.stride)
        if made != shape:
            raise ValueError(f"argument shortcut: its shape is {made}; accepted: {shape}, as y's")
        require_like("shortcut.x", shortcut.x, shortcut.x.shape, x)
    return shape


def launch_with_shortcut(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slope: Slope,
    epilogue: Epilogue,
    shortcut: Shortcut,
) -> Launch:
    """The launch of `conv1x1` with a projection, of the very tensors given; into a new y.

    Args:
        x, weight, shortcut: in channels_last memory; the others as for `conv1x1`.

    Raises:
        ValueError: as `conv1x1`.
    """
    shape = require_arguments(x, weight, bias, None, slope, (1, 1), epilogue, shortcut)
    slope = slope.contiguous() if isinstance(slope, Tensor) else slope
    y = empty_channels_last(shape, x)
    tensors = Tensors(x, weight, bias.contiguous(), None, slope, y)
    return launch(problem_of(x, weight, Geometry(), epilogue), tensors, shortcut=shortcut)


def conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    activation: str = "identity",
    slope: Slope = None,
    residual_last: bool = False,
    shortcut: Shortcut | None = None,
) -> Tensor:
    """act(W x + W_d x_d + bias + residual), or act(W x + W_d x_d + bias) + residual.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16.
        weight: [K, C, 1, 1], batch norm folded in.
        bias: [K], the shortcut's added in.
        residual: [N, K, P, Q].
        stride: rows and columns of x to step by.
        activation: one of activation.ACTIVATIONS.
        slope: a number for leaky_relu, a tensor [K] for prelu.
        residual_last: add the residual after the activation.
        shortcut: a projection added before the activation.

    Returns:
        [N, K, P, Q] in channels_last memory, of x's dtype.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not one of these.
    """
    epilogue = Epilogue.of(activation, residual is not None, residual_last)
    return checked(x, weight, bias, residual, slope, stride, epilogue, shortcut)


def checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Slope,
    stride: Pair,
    epilogue: Epilogue,
    shortcut: Shortcut | None = None,
) -> Tensor:
    """`conv1x1`, whose arguments it checks and lays out flat, as the op's schema has them."""
    require_arguments(x, weight, bias, residual, slope, stride, epilogue, shortcut)
    activation, last = epilogue.activation, epilogue.residual_last
    slopes = slope if isinstance(slope, Tensor) and activation == "prelu" else None
    number = float(slope) if isinstance(slope, float | int) else 0.0
    side: tuple[Tensor | None, Tensor | None, list[int]] = None, None, [1, 1]
    if shortcut is not None:
        side = shortcut.x, shortcut.weight, list(shortcut.stride)
    tensors = x, weight, bias, residual, slopes
    return conv1x1_op(*tensors, list(stride), *side, activation, number, last)
