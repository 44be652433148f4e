"""Activations: torch.nn layers where `fuse` knows them, functions elsewhere."""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from resfuse.kernels.onnx_reader.operators.convolution_layers import weight_of
from resfuse.kernels.onnx_reader.operators.shapes import reshaped
from resfuse.kernels.onnx_reader.reading.node import OnnxNode, Operators, scalar
from resfuse.kernels.onnx_reader.reading.values import Computed, Constant, Value

if TYPE_CHECKING:
    from resfuse.kernels.onnx_reader.reading.graph_reader import Reader


def _module(make: Callable[[], nn.Module]) -> Callable[..., Computed]:
    def read(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
        node.attribute("consumed_inputs")
        return reader.layer(node, make, reader.computed(x))

    return read


def _function(function: Callable[..., Any], **defaults: float) -> Callable[..., Computed]:
    """A function of torch's that takes the attributes in this order."""

    def read(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
        return reader.call(function, x, *(node.attribute(name, v) for name, v in defaults.items()))

    return read


def _leaky_relu(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
    slope = node.attribute("alpha", 0.01)
    return reader.layer(node, lambda: nn.LeakyReLU(slope), reader.computed(x))


def _prelu(reader: "Reader", node: OnnxNode, x: Value, slope: Value) -> Computed:
    x = reader.computed(x)
    if isinstance(slope, Constant):
        given = slope.array
        one, channels = given.size == 1, x.rank > 1 and x.size(1)
        along_channels = given.ndim == x.rank - 1 or (given.ndim == x.rank and given.shape[0] == 1)
        if one or (along_channels and given.size == channels == given.shape[1 - x.rank]):
            weight = given.reshape(-1)
            return reader.layer(node, lambda: nn.PReLU(weight.size), x, weight=weight)
    scaled = reader.call(operator.mul, x, slope)
    return reader.call(torch.where, reader.call(operator.lt, x, 0), scaled, x)


def _clip(
    reader: "Reader", node: OnnxNode, x: Value, low: Value | None = None, high: Value | None = None
) -> Computed:
    x = reader.computed(x)
    if node.opset < 11:
        lowest, highest = node.attribute("min"), node.attribute("max")
    else:
        lowest, highest = (
            None if each is None else scalar(weight_of(node, each, "a limit"))
            for each in (low, high)
        )
    if (lowest, highest) == (0, 6) and x.is_float:
        return reader.layer(node, nn.ReLU6, x)
    if lowest is None and highest is None:
        return x
    return reader.call(torch.clamp, x, lowest, highest)


def _hard_sigmoid(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
    alpha, beta = node.attribute("alpha", 0.2), node.attribute("beta", 0.5)
    if np.float32(alpha) == np.float32(1 / 6) and beta == 0.5:
        return reader.call(F.hardsigmoid, x)
    inner = reader.call(operator.add, reader.call(operator.mul, x, alpha), beta)
    return reader.call(torch.clamp, inner, 0.0, 1.0)


def _gelu(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
    how = node.attribute("approximate", "none")
    return reader.call(F.gelu, x, approximate=how)


def _softmax(function: Callable[..., Any]) -> Callable[..., Computed]:
    """Until opset 12 over all dimensions from `axis` on, and since over that one."""

    def read(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
        x = reader.computed(x)
        axis = node.attribute("axis", 1 if node.opset < 13 else -1)
        if not -x.rank <= axis < max(1, x.rank):
            raise node.refusal(f"axis={axis}")
        axis %= x.rank
        if node.opset >= 13 or axis == x.rank - 1:
            return reader.call(function, x, dim=axis)
        flat = reader.call(torch.flatten, x, axis)
        return reshaped(reader, reader.call(function, flat, dim=axis), x.shapes)

    return read


def _selu(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
    alpha, gamma = node.attribute("alpha"), node.attribute("gamma")
    if alpha is None and gamma is None:
        return reader.call(F.selu, x)
    raise node.refusal(f"alpha={alpha} with gamma={gamma}")


def _thresholded(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
    return reader.call(F.threshold, x, node.attribute("alpha", 1.0), 0.0)


ACTIVATIONS: Operators = {
    "Relu": _module(nn.ReLU),
    "HardSwish": _module(nn.Hardswish),
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Clip": _clip,
    "HardSigmoid": _hard_sigmoid,
    "Gelu": _gelu,
    "Softmax": _softmax(F.softmax),
    "LogSoftmax": _softmax(F.log_softmax),
    "Sigmoid": _function(torch.sigmoid),
    "Tanh": _function(torch.tanh),
    "Softplus": _function(F.softplus),
    "Softsign": _function(F.softsign),
    "Mish": _function(F.mish),
    "Elu": _function(F.elu, alpha=1.0),
    "Selu": _selu,
    "Celu": _function(F.celu, alpha=1.0),
    "ThresholdedRelu": _thresholded,
}
