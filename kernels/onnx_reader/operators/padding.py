"""Pad."""

from typing import TYPE_CHECKING

import torch.nn.functional as F

from resfuse.kernels.onnx_reader.operators.convolution_layers import weight_of
from resfuse.kernels.onnx_reader.operators.shapes import dim_of, ints_of
from resfuse.kernels.onnx_reader.reading.node import OnnxNode, Operators, scalar
from resfuse.kernels.onnx_reader.reading.values import Value

if TYPE_CHECKING:
    from resfuse.kernels.onnx_reader.reading.graph_reader import Reader

_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _pad(
    reader: "Reader", node: OnnxNode, x: Value, pads: Value | None = None,
    value: Value | None = None, axes: Value | None = None,
) -> Value:  # fmt: skip
    x = reader.computed(x)
    mode = node.attribute("mode", "constant")
    if mode not in _MODES:
        raise node.refusal(f"mode={mode!r}")
    if node.opset < 11:
        given, fill = node.ints("pads"), node.attribute("value", 0.0)
    else:
        given = ints_of(node, pads, "a padding")
        fill = scalar(weight_of(node, value, "a value")) if value is not None else 0.0
    chosen = ints_of(node, axes, "axes")
    dims = list(range(x.rank)) if chosen is None else [dim_of(node, a, x.rank) for a in chosen]
    if given is None or len(given) != 2 * len(dims):
        raise node.refusal(f"pads={given}")
    sides = {d: (given[i], given[i + len(dims)]) for i, d in enumerate(dims)}
    sides = {dim: pair for dim, pair in sides.items() if pair != (0, 0)}
    if not sides:
        return x
    first = min(sides)
    flat = [side for d in reversed(range(first, x.rank)) for side in sides.get(d, (0, 0))]
    if mode == "constant":
        return reader.call(F.pad, x, tuple(flat), "constant", fill)
    if first < 2 or x.rank not in (3, 4, 5) or min(flat) < 0:
        raise node.refusal(f"mode={mode!r} with pads={given}")
    flat += [0] * (2 * (x.rank - 2) - len(flat))
    return reader.call(F.pad, x, tuple(flat), _MODES[mode])


PADDING: Operators = {"Pad": _pad}
