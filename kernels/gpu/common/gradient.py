"""The backward pass of a fused convolution in eval mode, on torch's own ops.

The activation's input is computed again rather than kept: the fused kernel never writes it.
"""

import torch
from torch import Tensor

from resfuse.kernels.ops.activation import ACTIVATIONS, Slope


def conv_bn_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    slope: Slope,
    residual_last: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of y = act(conv(x, w) + b + residual), or act(conv(x, w) + b) + residual.

    Args:
        grad: of y [N, K, P, Q].
        x: [N, C, H, W]; weight: [K, C / groups, R, S]; bias: [K]; residual: [N, K, P, Q].
        residual_last: the residual was added after the activation.
        wanted: whether x's, weight's and bias's gradients are.

    Returns:
        The gradients of x, weight, bias, residual (meaningless where there was none), and of what
        the activation read, from which prelu's slope gets its own.
    """
    z = torch.ops.aten.convolution(
        x, weight, bias, stride, padding, dilation, False, [0, 0], groups
    )
    if residual is not None and not residual_last:
        z = z + residual
    grad_z = ACTIVATIONS[activation].backward(grad, z, slope)
    grads = torch.ops.aten.convolution_backward(
        grad_z, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups,
        list(wanted),
    )  # fmt: skip
    grad_slope = torch.where(z > 0, 0.0, z) * grad
    return *grads, grad if residual_last else grad_z, grad_slope
