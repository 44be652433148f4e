"""Gemm and MatMul: linear layers, where a weight is a matrix of the file."""

import operator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from resfuse.kernels.onnx_reader.reading.node import OnnxNode, Operators
from resfuse.kernels.onnx_reader.reading.values import Computed, Constant, Value

if TYPE_CHECKING:
    from resfuse.kernels.onnx_reader.reading.graph_reader import Reader


def _gemm(reader: "Reader", node: OnnxNode, a: Value, b: Value, c: Value | None = None) -> Computed:
    alpha, beta = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
    across, along = node.attribute("transA", 0), node.attribute("transB", 0)
    a = reader.computed(a)
    if a.rank != 2 or any(len(shape) != 2 for shape in b.shapes):
        raise node.refusal(f"a product of {a.shapes[0]} and {b.shapes[0]}")
    if across:
        a = reader.call(torch.t, a)
    if isinstance(b, Constant) and not isinstance(c, Computed) and alpha == 1:
        weight = b.array if along else b.array.T
        features = weight.shape[0]
        bias = None if c is None else c.array * c.array.dtype.type(beta)
        if bias is None or bias.shape in ((), (1,), (1, 1), (features,), (1, features)):
            if bias is not None:
                bias = np.broadcast_to(bias.reshape(-1), (features,))
            return linear(reader, node, a, weight, bias)
    right = reader.call(torch.t, b) if along else b
    product = reader.call(torch.matmul, a, right)
    if alpha != 1:
        product = reader.call(operator.mul, product, alpha)
    if c is None:
        return product
    scaled = c if beta == 1 else reader.call(operator.mul, c, beta)
    return reader.call(operator.add, product, scaled)


def _matmul(reader: "Reader", node: OnnxNode, a: Value, b: Value) -> Computed:
    if isinstance(b, Constant) and len(b.shapes[0]) == 2 and isinstance(a, Computed) and a.rank > 1:
        return linear(reader, node, a, b.array.T, None)
    return reader.call(torch.matmul, a, b)


def linear(
    reader: "Reader", node: OnnxNode, x: Computed, weight: np.ndarray, bias: np.ndarray | None
) -> Computed:
    features, given = weight.shape
    return reader.layer(
        node, lambda: nn.Linear(given, features, bias is not None), x, weight=weight, bias=bias
    )


LINEAR: Operators = {"Gemm": _gemm, "MatMul": _matmul}
