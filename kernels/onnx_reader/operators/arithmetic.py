"""Elementwise arithmetic, comparisons and casts, with numpy's broadcasting on both sides."""

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from resfuse.kernels.onnx_reader.reading.node import OnnxNode, Operators, scalar
from resfuse.kernels.onnx_reader.reading.values import Computed, Constant, Value

if TYPE_CHECKING:
    from resfuse.kernels.onnx_reader.reading.graph_reader import Reader


def number_or_tensor(value: Value, beside: Value) -> Any:
    """A single number as a Python one, which torch rounds to the tensor's dtype, where it does not
    give the result more dimensions."""
    if not isinstance(value, Constant) or not isinstance(beside, Computed):
        return value
    if any(array.size != 1 or array.ndim > beside.rank for array in value.arrays):
        return value
    number = scalar(value.array)
    fits = beside.is_float and isinstance(number, float)
    return number if fits else value


def _binary(function: Callable[..., Any]) -> Callable[..., Computed]:
    def read(reader: "Reader", node: OnnxNode, a: Value, b: Value) -> Computed:
        return reader.call(function, number_or_tensor(a, b), number_or_tensor(b, a))

    return read


def _div(reader: "Reader", node: OnnxNode, a: Value, b: Value) -> Computed:
    if reader.computed(a).is_float:
        return _binary(operator.truediv)(reader, node, a, b)
    return reader.call(torch.div, a, b, rounding_mode="trunc")


def _mod(reader: "Reader", node: OnnxNode, a: Value, b: Value) -> Computed:
    return reader.call(torch.fmod if node.attribute("fmod", 0) else torch.remainder, a, b)


def _pow(reader: "Reader", node: OnnxNode, a: Value, b: Value) -> Computed:
    power = number_or_tensor(b, a)
    found = reader.call(operator.pow, a, power)
    own = reader.computed(a).metas[0].dtype
    return found if found.metas[0].dtype == own else reader.method("to", found, own)


def _folded(function: Callable[..., Any]) -> Callable[..., Computed]:
    """Of any number of tensors."""

    def read(reader: "Reader", node: OnnxNode, *values: Value) -> Computed:
        pairwise = functools.partial(reader.call, function)
        found: Value = functools.reduce(pairwise, values)
        return reader.computed(found)

    return read


def _mean(reader: "Reader", node: OnnxNode, *values: Value) -> Computed:
    return reader.call(operator.truediv, _folded(operator.add)(reader, node, *values), len(values))


def _unary(function: Callable[..., Any]) -> Callable[..., Computed]:
    def read(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
        return reader.call(function, x)

    return read


def _where(reader: "Reader", node: OnnxNode, condition: Value, a: Value, b: Value) -> Computed:
    return reader.call(torch.where, condition, a, b)


def _cast(reader: "Reader", node: OnnxNode, x: Value) -> Value:
    x = reader.computed(x)
    to = node.attribute("to")
    node.attribute("saturate")  # of 8-bit floats
    node.attribute("round_mode")
    try:
        dtype = torch.from_numpy(np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(to))).dtype
    except (KeyError, TypeError):
        raise node.refusal(f"to={to}") from None
    return x if x.metas[0].dtype == dtype else reader.method("to", x, dtype)


def _cast_like(reader: "Reader", node: OnnxNode, x: Value, like: Value) -> Value:
    x, dtype = reader.computed(x), reader.computed(like).metas[0].dtype
    node.attribute("saturate")
    node.attribute("round_mode")
    return x if x.metas[0].dtype == dtype else reader.method("to", x, dtype)


def _same(reader: "Reader", node: OnnxNode, x: Value) -> Value:
    return x


def _dropout(
    reader: "Reader", node: OnnxNode, x: Value, ratio: Value | None = None,
    training: Value | None = None,
) -> Value:  # fmt: skip
    node.attribute("ratio")
    node.attribute("seed")
    if training is not None and not (isinstance(training, Constant) and not scalar(training.array)):
        raise node.refusal("training_mode")
    return x


ARITHMETIC: Operators = {
    "Add": _binary(operator.add),
    "Sub": _binary(operator.sub),
    "Mul": _binary(operator.mul),
    "Div": _div,
    "Mod": _mod,
    "Pow": _pow,
    "Min": _folded(torch.minimum),
    "Max": _folded(torch.maximum),
    "Sum": _folded(operator.add),
    "Mean": _mean,
    "Equal": _binary(operator.eq),
    "Greater": _binary(operator.gt),
    "GreaterOrEqual": _binary(operator.ge),
    "Less": _binary(operator.lt),
    "LessOrEqual": _binary(operator.le),
    "And": _binary(torch.logical_and),
    "Or": _binary(torch.logical_or),
    "Xor": _binary(torch.logical_xor),
    "Not": _unary(torch.logical_not),
    "Where": _where,
    "Abs": _unary(torch.abs),
    "Neg": _unary(torch.neg),
    "Sqrt": _unary(torch.sqrt),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Floor": _unary(torch.floor),
    "Ceil": _unary(torch.ceil),
    "Round": _unary(torch.round),
    "Sign": _unary(torch.sign),
    "Erf": _unary(torch.erf),
    "Reciprocal": _unary(torch.reciprocal),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Identity": _same,
    "Dropout": _dropout,
}
