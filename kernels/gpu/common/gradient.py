"""The backward pass of a fused convolution in eval mode, on torch's own ops.

The activation's input is computed again rather than kept: the fused kernel never writes it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.kernels.ops.activation import ACTIVATIONS, Slope
from resfuse.kernels.ops.conv_problem import Epilogue, Geometry


def conv_bn_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Slope,
    geometry: Geometry,
    epilogue: Epilogue,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of y = act(conv(x, w) + b + residual), or act(conv(x, w) + b) + residual.

    Args:
        grad: of y [N, K, P, Q].
        x: [N, C, H, W]; weight: [K, C / groups, R, S]; bias: [K]; residual: [N, K, P, Q].
        wanted: whether x's, weight's and bias's gradients are.

    Returns:
        The gradients of x, weight, bias, residual (meaningless where there was none), and of what
        the activation read, from which prelu's slope gets its own.
    """
    last = epilogue.residual_last
    z = F.conv2d(x, weight, bias, *geometry)
    if residual is not None and not last:
        z = z + residual
    grad_z = ACTIVATIONS[epilogue.activation].backward(grad, z, slope)
    grads = convolution_backward(grad_z, x, weight, geometry, wanted)
    grad_slope = torch.where(z > 0, 0.0, z) * grad
    return *grads, grad if last else grad_z, grad_slope


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of conv(x, weight) + bias by x, weight and bias [K], where they are wanted."""
    *window, groups = geometry
    bias_sizes, output_padding = [weight.shape[0]], [0, 0]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, bias_sizes, *window, False, output_padding, groups, list(wanted)
    )
