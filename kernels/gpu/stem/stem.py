"""y = max_pool(relu(conv(x) + bias)): an ImageNet ResNet's stem in one kernel. The convolution is
7x7, stride 2, padding 3; the pool 3x3, stride 2, padding 1.

x [N, C, H, W], C of 1 to 4, w [K, C, 7, 7] -> y [N, K, P2, Q2], NHWC in memory; the convolution's
output [N, K, P, Q] never goes to memory. In ResNet-50 at batch 256 and 16 bits that is 411 MB,
written once and read once: 180 MB are moved instead of 1002.

FLOPs: 2 * N*P*Q * K * 49*C, the convolution once; the kernel does more, as stem_kernel.py says. Its
tiles are stem_config.py's.
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
from resfuse.kernels.gpu.common.gradient import convolution_backward
from resfuse.kernels.gpu.common.launch import Launch, runs_triton
from resfuse.kernels.gpu.stem.stem_kernel import launch, pack_weight
from resfuse.kernels.ops.conv_problem import Geometry


def stem_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`stem` in plain torch, in any dtype: the specification."""
    z = F.conv2d(x, weight, stride=2, padding=3)
    if bias is not None:
        z = z + bias[:, None, None]
    return F.max_pool2d(F.relu(z), 3, 2, 1).to(x.dtype)


@torch.library.custom_op("resfuse::stem", mutates_args=())
def stem_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`stem`, its arguments unchecked."""
    if not runs_triton(x):
        return channels_last(stem_ref(x, weight, bias))
    y = empty_channels_last(_output_shape(x.shape, weight.shape), x)
    if y.numel():
        bias = bias.contiguous() if bias is not None else None
        launch(y, channels_last(x), pack_weight(weight), bias).run()
    return y


def _output_shape(x: Any, weight: Any) -> list[int]:
    """[N, K, P2, Q2] from the shapes of x and weight; a quarter of x, rounded up."""
    return [x[0], weight[0], (x[2] + 3) // 4, (x[3] + 3) // 4]


@stem_op.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return empty_channels_last(_output_shape(x.shape, weight.shape), x)


@register_flop_formula(torch.ops.resfuse.stem)
def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    p, q = (x[2] + 1) // 2, (x[3] + 1) // 2
    return 2 * x[0] * p * q * weight[0] * weight[1] * 49


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """On torch's own ops; the convolution is computed again."""
    x, weight, bias = ctx.saved_tensors
    needs = ctx.needs_input_grad
    z = F.conv2d(x, weight, bias.to(x.dtype) if bias is not None else None, 2, 3)
    pool = [[3, 3], [2, 2], [1, 1], [1, 1], False]
    indices = torch.ops.aten.max_pool2d_with_indices(F.relu(z), *pool)[1]
    grad = torch.ops.aten.max_pool2d_with_indices_backward(grad, z, *pool, indices)
    grad_x, grad_weight, grad_bias = convolution_backward(
        grad * (z > 0), x, weight, Geometry((2, 2), (3, 3)), needs
    )
    if grad_bias is not None and bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return grad_x, grad_weight, grad_bias


stem_op.register_autograd(_backward, setup_context=_setup_context)


def stem(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """max_pool(relu(conv(x) + bias)): 7x7, stride 2, padding 3; then 3x3, stride 2, padding 1.

    Args:
        x: [N, C, H, W], C of 1 to 4; float32, float16 or bfloat16.
        weight: [K, C, 7, 7], batch norm folded in.
        bias: [K].

    Returns:
        [N, K, (H + 3) // 4, (W + 3) // 4] in channels_last memory, of x's dtype.

    Raises:
        ValueError: an argument's shape, dtype or device is not one of these.
    """
    _require_arguments(x, weight, bias)
    return stem_op(x, weight, bias)


def launch_of(x: Tensor, weight: Tensor, bias: Tensor) -> Launch:
    """The launch that `stem` comes to, of the very tensors given; into a new y.

    Args:
        x: in channels_last memory; the others as for `stem`.

    Raises:
        ValueError: as `stem`.
    """
    _require_arguments(x, weight, bias)
    y = empty_channels_last(_output_shape(x.shape, weight.shape), x)
    return launch(y, x, pack_weight(weight), bias.contiguous())


def _require_arguments(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    require_4d("x", x)
    require_4d("weight", weight)
    if not 1 <= x.shape[1] <= 4:
        raise ValueError(f"argument x: {x.shape[1]} channels; accepted: 1 to 4")
    require_like("weight", weight, (weight.shape[0], x.shape[1], 7, 7), x)
    require_like("bias", bias, weight.shape[:1], x, or_fp32=True)
