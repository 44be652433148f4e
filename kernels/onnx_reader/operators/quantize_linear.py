"""QuantizeLinear and DequantizeLinear, as quantised files have them in pairs: y = scale * (q - z).

Weights become the real numbers that their integers stand for. A pair around an activation becomes
one FakeQuantize, so all that is computed between pairs stays in floating point, as the file says.
"""

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, nn

from resfuse.kernels.onnx_reader.operators.convolution_layers import weight_of
from resfuse.kernels.onnx_reader.reading.node import OnnxNode, Operators, scalar
from resfuse.kernels.onnx_reader.reading.values import (
    Computed,
    Constant,
    Quantized,
    QuantizedAs,
    Value,
)

if TYPE_CHECKING:
    from resfuse.kernels.onnx_reader.reading.graph_reader import Reader

_STORED = {TensorProto.INT8: np.dtype(np.int8), TensorProto.UINT8: np.dtype(np.uint8)}
_SCALES = (np.float16, np.float32)


class FakeQuantize(nn.Module):
    """y = scale * clamp(round(x / scale), qmin - zero_point, qmax - zero_point): each number as an
    integer of qmin..qmax keeps it. Halves are rounded to the even; NaN stays NaN.

    torch.fake_quantize_per_tensor_affine multiplies by 1 / scale instead, which moves a number
    halfway between two integers now and then, and it cannot be exported.
    """

    def __init__(self, scale: float, zero_point: int, qmin: int, qmax: int) -> None:
        super().__init__()
        self.scale, self.zero_point, self.qmin, self.qmax = scale, zero_point, qmin, qmax

    def forward(self, x: Tensor) -> Tensor:
        least, most = float(self.qmin - self.zero_point), float(self.qmax - self.zero_point)
        return torch.clamp(torch.round(x / self.scale), least, most) * self.scale

    def extra_repr(self) -> str:
        return f"scale={self.scale:.6g}, zero_point={self.zero_point}, {self.qmin}..{self.qmax}"


def _quantize(
    reader: "Reader",
    node: OnnxNode,
    x: Value,
    scale: Value | None = None,
    zero_point: Value | None = None,
) -> Value:
    for name, default in (("saturate", 1), ("block_size", 0), ("precision", 0)):
        node.require(name, default)
    asked = node.attribute("output_dtype", 0)
    if asked and asked not in _STORED:
        raise node.refusal(f"the output type {_type_name(asked)}")
    stored = _STORED[asked] if asked else np.dtype(np.uint8)
    if zero_point is not None:
        given = weight_of(node, zero_point, "a zero point").dtype
        if given not in _STORED.values() or (asked and given != stored):
            raise node.refusal(f"a zero point of type {given}")
        stored = given
    scales, zeros = _scales(node, scale, zero_point, stored)
    axis = node.attribute("axis", 1)
    if isinstance(x, Computed):
        if scales.size != 1:
            raise node.refusal(f"an activation with {scales.size} scales, one a channel,")
        if not x.is_float or str(x.metas[0].dtype) != f"torch.{scales.dtype}":
            raise node.refusal(f"{x.metas[0].dtype} with a scale of {scales.dtype}")
        return _fake_quantized(reader, node, x, float(scalar(scales)), int(scalar(zeros)), stored)
    array = x.array
    if array.dtype != scales.dtype or np.isnan(array).any():
        raise node.refusal(f"a weight of {array.dtype}, or with NaN in it,")
    scales, zeros = _along(node, array.shape, axis, scales, zeros)
    reader.folding.charge_weights(array.size)
    limits = np.iinfo(stored)
    with np.errstate(over="ignore"):
        whole = np.rint(array / scales) + zeros
    return reader.constant(node.outputs[0], whole.clip(limits.min, limits.max).astype(stored))


def _fake_quantized(
    reader: "Reader", node: OnnxNode, x: Computed, scale: float, zero: int, stored: np.dtype
) -> Quantized:
    limits = np.iinfo(stored)
    y = reader.layer(node, lambda: FakeQuantize(scale, zero, int(limits.min), int(limits.max)), x)
    return Quantized(y.node, y.metas, QuantizedAs(scale, zero, stored))


def _dequantize(
    reader: "Reader",
    node: OnnxNode,
    x: Value,
    scale: Value | None = None,
    zero_point: Value | None = None,
) -> Value:
    for name in ("block_size", "output_dtype"):
        node.require(name, 0)
    axis = node.attribute("axis", 1)
    if isinstance(x, Quantized):
        scales, zeros = _scales(node, scale, zero_point, x.stored.dtype)
        same = scales.size == 1 and x.stored == QuantizedAs(
            float(scalar(scales)), int(scalar(zeros)), x.stored.dtype
        )
        if not same:
            raise node.refusal("another scale or zero point than that of its QuantizeLinear")
        return Computed(x.node, x.metas)
    if isinstance(x, Computed) and x.metas[0].dtype == torch.uint8:
        return _of_bytes(
            reader, node, x, axis, *_scales(node, scale, zero_point, np.dtype(np.uint8))
        )
    if not isinstance(x, Constant):
        raise node.refusal("an activation that no QuantizeLinear computes")
    array = x.array
    if array.dtype not in (np.int8, np.uint8, np.int32):
        raise node.refusal(f"a weight of {array.dtype}")
    how = _scales(node, scale, zero_point, array.dtype)
    scales, zeros = _along(node, array.shape, axis, *how)
    if array.dtype == np.int32 and zeros.any():
        raise node.refusal("a zero point of int32 other than 0")
    reader.folding.charge_weights(array.size)
    whole = array.astype(np.int64) - zeros
    return reader.constant(node.outputs[0], np.asarray(whole.astype(scales.dtype) * scales))


def _of_bytes(
    reader: "Reader", node: OnnxNode, x: Computed, axis: int, scales: np.ndarray, zeros: np.ndarray
) -> Value:
    """The real numbers that the bytes of the input stand for."""
    scales, zeros = _along(node, x.shapes[0], axis, scales, zeros)
    y = reader.method("to", x, torch.from_numpy(np.empty(0, scales.dtype)).dtype)
    if zeros.any():
        y = reader.call(operator.sub, y, _number(reader, zeros.astype(scales.dtype)))
    if (scales != 1).any():
        y = reader.call(operator.mul, y, _number(reader, scales))
    return y


def _number(reader: "Reader", array: np.ndarray) -> Any:
    return reader.constant("scale", array) if array.ndim else scalar(array)


def _scales(
    node: OnnxNode, scale: Value | None, zero_point: Value | None, stored: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the zero point, of one shape, the latter as int64; zeros where it is left out.

    Raises:
        ValueError: they are no positive finite numbers, or do not fit each other or `stored`.
    """
    if scale is None:
        raise node.refusal("a scale that is left out")
    scales = weight_of(node, scale, "a scale")
    if scales.dtype not in _SCALES:
        raise node.refusal(f"a scale of type {scales.dtype}")
    if scales.ndim > 1 or not scales.size:
        raise node.refusal(f"a scale of shape {list(scales.shape)}")
    wrong = scales[~(np.isfinite(scales) & (scales > 0))]
    if wrong.size:
        raise node.refusal(f"a scale of {wrong.reshape(-1)[0]}")
    if zero_point is None:
        return scales, np.zeros(scales.shape, np.int64)
    zeros = weight_of(node, zero_point, "a zero point")
    if zeros.dtype != stored:
        raise node.refusal(f"a zero point of type {zeros.dtype} for {stored}")
    if zeros.size != scales.size or zeros.ndim > 1:
        raise node.refusal(f"a zero point of {list(zeros.shape)} for {list(scales.shape)} scales")
    return scales, zeros.reshape(scales.shape).astype(np.int64)


def _along(
    node: OnnxNode, shape: tuple[int, ...], axis: int, scales: np.ndarray, zeros: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both shaped so that they broadcast over a tensor: one, or one an index of `axis`."""
    if scales.size == 1:
        return scales.reshape(()), zeros.reshape(())
    if not -len(shape) <= axis < len(shape) or shape[axis] != scales.size:
        raise node.refusal(f"{scales.size} scales along axis {axis} of {list(shape)}")
    around = [1] * len(shape)
    around[axis] = scales.size
    return scales.reshape(around), zeros.reshape(around)


def _type_name(number: int) -> str:
    known = number in TensorProto.DataType.values()
    return TensorProto.DataType.Name(number) if known else str(number)


QUANTIZATION: Operators = {"QuantizeLinear": _quantize, "DequantizeLinear": _dequantize}
