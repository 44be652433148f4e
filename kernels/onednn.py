"""A fused convolution on the CPU: oneDNN's convolution with bias, residual and activation in its
epilogue, on a weight laid out once for it. The ops are the ones inductor's freezing emits.

x [N, C, H, W] in any format -> y [N, K, P, Q], channels_last.

oneDNN's ReLU, ReLU6 and Hardswish in an epilogue turn NaN into a number, where torch's keep it (so does
whatever else uses them: torch.compile with freezing). A pass of its own over every output would keep
it, at 18 % of ResNet-50's time at batch 8 by its bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from resfuse.kernels.activation import ACTIVATIONS, Slope

# our name -> oneDNN's, and its scalars
_ELTWISE: dict[str, tuple[str, list[float]]] = {
    "identity": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
    "hardswish": ("hardswish", []),
}


@dataclass(frozen=True)
class Geometry:
    """How the window of a convolution moves."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def as_lists(self) -> tuple[list[int], list[int], list[int], int]:
        """In the order of oneDNN's ops: padding, stride, dilation, groups."""
        return list(self.padding), list(self.stride), list(self.dilation), self.groups


def supports(dtype: torch.dtype) -> bool:
    """True where this torch and CPU have the fused ops for `dtype`."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def prepack(weight: Tensor, geometry: Geometry, input_shape: torch.Size) -> Tensor:
    """Lays out a weight [K, C / groups, R, S] as oneDNN likes it for inputs of that shape.

    Returns:
        An opaque tensor for `conv`; it serves inputs of other sizes too, at some cost a call.
    """
    channels_last = weight.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(
        channels_last, *geometry.as_lists(), list(input_shape)
    )


def conv(
    x: Tensor, packed: Tensor, bias: Tensor, geometry: Geometry, activation: str, slope: Slope
) -> Tensor:
    """act(conv(x) + bias)."""
    name, scalars = _ELTWISE.get(activation, ("none", []))
    if activation == "leaky_relu":
        assert isinstance(slope, float | int)
        name, scalars = "leaky_relu", [float(slope)]
    y = torch.ops.mkldnn._convolution_pointwise.default(
        x, packed, bias, *geometry.as_lists(), name, scalars, ""
    )
    return ACTIVATIONS[activation].forward(y, slope) if activation == "prelu" else y


def conv_add(
    x: Tensor,
    packed: Tensor,
    bias: Tensor,
    residual: Tensor,
    geometry: Geometry,
    activation: str,
    slope: Slope,
    overwrite: bool = False,
) -> Tensor:
    """act(conv(x) + bias + residual); with `overwrite`, written over the residual [N, K, P, Q]."""
    if geometry.groups != 1:  # torch has no fused add for groups, and asserts on bf16 there
        y = conv(x, packed, bias, geometry, "identity", None).add_(residual)
        return ACTIVATIONS[activation].forward(y, slope)
    relu = activation == "relu"
    epilogue = ("add", 1.0, "relu" if relu else None, [], None)
    if overwrite and residual.is_contiguous(memory_format=torch.channels_last):
        y = torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, packed, bias, *geometry.as_lists(), *epilogue
        )
    else:
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, packed, bias, *geometry.as_lists(), *epilogue
        )
    return y if relu else ACTIVATIONS[activation].forward(y, slope)
