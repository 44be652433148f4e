"""Reads the pairs of nodes that a program of torch's own quantisation (PT2E) has around its
activations: one makes integers of numbers, q = clamp(round(x / scale) + zero_point, least, most),
and one or more make numbers of them again, scale * (q - zero_point).

A pair becomes one rounding in floating point, in the four operations that a quantised ONNX file has
for it, and quantization/given_scales.py finds integers to compute with in both. Integers that are
read otherwise, and other ways to round (a scale for each channel of an activation, scales found in
each call, float8), stay operations of torch's; what those make of weights is derived state.

The operations are known by their names, since torch registers them when torch.ao.quantization is
imported, which takes 0.4 s.
"""

from collections.abc import Callable

import torch
import torch.fx as fx

from resfuse.kernels.engine.frontend.graph_builder import Captured
from resfuse.kernels.engine.frontend.operations import arguments
from resfuse.kernels.engine.ir.graph import Node, Torch, Value

_QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
_DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"


def _add_quantize(read: Captured, node: fx.Node) -> bool:
    """Adds nothing where the integers are read in pairs alone: each adds the whole rounding."""
    return _is_paired(read, node)


def _add_dequantize(read: Captured, node: fx.Node) -> bool:
    q, *_ = arguments(node)
    if str(q.target) != _QUANTIZE or not _is_paired(read, q):
        return False
    for other in q.users:
        if other in read.names:
            read.same(node, other)
            return True
    x, scale, zero_point, least, most, _ = arguments(q)
    value = Value(tuple(node.meta["val"].shape), torch.float32)
    source = read.name_of(x)
    limits = float(least - zero_point), float(most - zero_point)
    read.add_value(node, node.name)
    for name, target, numbers in (
        (f"{node.name}:scaled", "aten.mul.Tensor", (1.0 / scale,)),
        (f"{node.name}:rounded", "aten.round.default", ()),
        (f"{node.name}:clamped", "aten.clamp.default", limits),
        (node.name, "aten.mul.Tensor", (scale,)),
    ):
        read.nodes.append(Node(name, Torch(target, ({"value": 0}, *numbers)), (source,)))
        read.values[name], source = value, name
    return True


def _is_paired(read: Captured, q: fx.Node) -> bool:
    """Returns whether a node makes integers of numbers in float32 that are made numbers again by
    the same scale and zero point, and not read by anything else."""
    x, *how = arguments(q)
    known = isinstance(x, fx.Node) and (x in read.names or x in read.pixels)
    if len(how) != 5 or not known or x.meta["val"].dtype != torch.float32:
        return False
    scale, zero_point, least, most, dtype = how
    sound: bool = scale > 0 and least <= zero_point <= most and dtype in (torch.uint8, torch.int8)
    return sound and all(
        str(user.target) == _DEQUANTIZE
        and [*user.args] == [q, *how]
        and user.meta["val"].dtype == torch.float32
        for user in q.users
    )


PAIRS: dict[str, Callable[[Captured, fx.Node], bool]] = {
    _QUANTIZE: _add_quantize,
    _DEQUANTIZE: _add_dequantize,
}
