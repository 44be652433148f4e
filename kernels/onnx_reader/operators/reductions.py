"""Reductions, whose axes are an attribute or an input; softmax is with the activations."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from resfuse.kernels.onnx_reader.operators.shapes import axes_of, dim_of
from resfuse.kernels.onnx_reader.reading.node import OnnxNode, Operators
from resfuse.kernels.onnx_reader.reading.values import Computed, Value

if TYPE_CHECKING:
    from resfuse.kernels.onnx_reader.reading.graph_reader import Reader

Reduce = Callable[..., Any]


def _reduction(
    function: Reduce, before: Reduce | None = None, after: Reduce | None = None
) -> Callable[..., Value]:
    def read(reader: "Reader", node: OnnxNode, x: Value, axes: Value | None = None) -> Value:
        x = reader.computed(x)
        keep = bool(node.attribute("keepdims", 1))
        none = bool(node.attribute("noop_with_empty_axes", 0))
        dims = axes_of(node, axes, x.rank)
        whole = not dims
        if whole and not none:
            dims = list(range(x.rank))
        if before is not None:
            x = reader.call(before, x)
        if not (whole and none):
            x = reader.call(function, x, tuple(dims), keep)
        return reader.call(after, x) if after is not None else x

    return read


def _product(reader: "Reader", node: OnnxNode, x: Value, axes: Value | None = None) -> Value:
    x = reader.computed(x)
    keep = bool(node.attribute("keepdims", 1))
    node.require("noop_with_empty_axes", 0)
    for dim in sorted(axes_of(node, axes, x.rank) or range(x.rank), reverse=True):
        x = reader.call(torch.prod, x, dim, keep)
    return x


def _arg(function: Reduce) -> Callable[..., Computed]:
    def read(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
        x = reader.computed(x)
        node.require("select_last_index", 0)
        axis = dim_of(node, node.attribute("axis", 0), x.rank)
        return reader.call(function, x, axis, bool(node.attribute("keepdims", 1)))

    return read


REDUCTIONS: Operators = {
    "ReduceMean": _reduction(torch.mean),
    "ReduceSum": _reduction(torch.sum),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMin": _reduction(torch.amin),
    "ReduceL1": _reduction(torch.sum, before=torch.abs),
    "ReduceL2": _reduction(torch.sum, before=torch.square, after=torch.sqrt),
    "ReduceSumSquare": _reduction(torch.sum, before=torch.square),
    "ReduceLogSum": _reduction(torch.sum, after=torch.log),
    "ReduceLogSumExp": _reduction(torch.logsumexp),
    "ReduceProd": _product,
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
}
