"""PackedConv: oneDNN's convolution on the CPU with bias, residual and activation in its epilogue,
and a weight packed once. The ops are those that inductor's freezing emits.

oneDNN's ReLU and ReLU6 in an epilogue turn NaN into a number, where torch's keep it; torch.compile
with freezing does the same. A separate pass over every output would keep NaN, but its traffic would
take 18 % of ResNet-50's time at batch 8.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resfuse.kernels.ops.activation import ACTIVATIONS, Slope
from resfuse.kernels.ops.conv_problem import Geometry

# activation -> oneDNN's name for it and its scalars
_ELTWISE: dict[str, tuple[str, list[float]]] = {
    "identity": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
    "hardswish": ("hardswish", []),
    "sigmoid": ("sigmoid", []),
}


def supports(dtype: torch.dtype) -> bool:
    """Returns whether this torch and CPU have the fused ops for `dtype`."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def multiplies_tiles(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN multiplies tiles in `dtype` here (AMX), as native steps do not."""
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and supports(dtype)


class PackedConv:
    """act(conv(x) + bias + residual): x [N, C, H, W] of any format -> [N, K, P, Q], channels_last.

    Args:
        weight: [K, C / groups, R, S], float32, or a dtype that `supports` allows; not kept.
        bias: [K], of the same dtype.
        geometry: of the convolution.
        activation: a name of ACTIVATIONS.
        slope: of leaky_relu (a number) or prelu (a tensor [K]).
        input_shape: of the inputs to lay out the weight for; others are served too, at some cost.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        geometry: Geometry,
        activation: str,
        slope: Slope,
        input_shape: torch.Size,
    ) -> None:
        window = [list(geometry.padding), list(geometry.stride), list(geometry.dilation)]
        channels_last = weight.contiguous(memory_format=torch.channels_last)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            channels_last, *window, geometry.groups, list(input_shape)
        )
        self._bias = bias
        self._layer = (self.weight, bias, *window, geometry.groups)
        self._act, self._slope = ACTIVATIONS[activation], slope
        # oneDNN has no activation with a slope a channel, and torch's op no hardsigmoid; GELU is
        # left to torch, which has NaN and infinity where it has them without oneDNN
        self._fused = activation in _ELTWISE or activation == "leaky_relu"
        name, scalars = _ELTWISE.get(activation, ("none", []))
        if activation == "leaky_relu":
            assert isinstance(slope, float | int)
            name, scalars = "leaky_relu", [float(slope)]
        self._epilogue = (name, scalars, "")
        # torch has no fused add for groups (and asserts on bf16 there), and with one only ReLU
        self._adds = geometry.groups == 1
        self._relu = activation == "relu"
        self._add_epilogue: tuple[Any, ...] = ("add", 1.0, "relu" if self._relu else None, [], None)
        self._conv = torch.ops.mkldnn._convolution_pointwise.default
        self._conv_add = torch.ops.mkldnn._convolution_pointwise.binary
        self._conv_add_ = torch.ops.mkldnn._convolution_pointwise_.binary

    def __call__(self, x: Tensor) -> Tensor:
        y = self._conv(x, *self._layer, *self._epilogue)
        return y if self._fused else self._act.forward(y, self._slope)

    def add(self, x: Tensor, residual: Tensor, overwrite: bool = False) -> Tensor:
        """Returns act(conv(x) + bias + residual), with a residual [N, K, P, Q] that is overwritten
        if `overwrite`."""
        if not self._adds:
            y = self._conv(x, *self._layer, "none", [], "").add_(residual)
        elif overwrite and residual.is_contiguous(memory_format=torch.channels_last):
            y = self._conv_add_(residual, x, *self._layer, *self._add_epilogue)
        else:
            y = self._conv_add(x, residual, *self._layer, *self._add_epilogue)
        return y if self._adds and self._relu else self._act.forward(y, self._slope)

    def bound(self) -> Callable[[Tensor], Tensor]:
        """Returns a function equal to `self`, with all attributes looked up beforehand."""
        if not self._fused:
            return self
        conv, arguments = self._conv, (*self._layer, *self._epilogue)
        return lambda x: conv(x, *arguments)

    def bound_add(self, overwrite: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns a function (x, residual) equal to `self.add`, with all attributes looked up
        beforehand; the residual must be channels_last."""
        if not (self._adds and self._relu):
            return lambda x, residual: self.add(x, residual, overwrite)
        arguments = (*self._layer, *self._add_epilogue)
        if overwrite:
            conv_add_ = self._conv_add_
            return lambda x, residual: conv_add_(residual, x, *arguments)
        conv_add = self._conv_add
        return lambda x, residual: conv_add(x, residual, *arguments)

    @property
    def tensors(self) -> list[Tensor]:
        """Returns the tensors that the convolution stores."""
        slope = [self._slope] if isinstance(self._slope, Tensor) else []
        return [self.weight, self._bias, *slope]

    def dense_weight(self) -> Tensor:
        """Returns the weight [K, C / groups, R, S] in its original layout."""
        weight: Tensor = self.weight.to_dense()
        return weight
