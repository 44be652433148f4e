"""Checks that values read from a file are quantised where their operations take it for granted."""

from collections.abc import Sequence

from resfuse.kernels.engine.frontend.conversions import moves
from resfuse.kernels.engine.ir.graph import Concat, MaxPool, Node, Pick, Torch, Value
from resfuse.kernels.engine.saving.graph_structure import Unsound
from resfuse.kernels.ops.quantization import QUANTIZED_DTYPES


def require_quantized(node: Node, value: Value, inputs: Sequence[Value]) -> None:
    """Raises Unsound unless a node's result, and what it reads, are quantised as its operation
    computes them: 8-bit integers, and with the scale of its inputs where they are only moved.

    Args:
        value: the node's result.
    """
    if value.quantization is not None and value.dtype not in QUANTIZED_DTYPES:
        raise Unsound(f"{node.name} is {value.dtype}, and quantised")
    scales = [given.quantization for given in inputs]
    if isinstance(node.op, Torch) and not moves(node):
        if any(scale is not None for scale in (value.quantization, *scales)):
            raise Unsound(f"{node.name} has torch compute quantised values")
        return
    if isinstance(node.op, MaxPool | Pick | Concat | Torch):
        if any(scale != value.quantization for scale in scales):
            raise Unsound(f"{node.name} moves values to another scale")
        if isinstance(node.op, Torch):
            return  # which also moves integers that are no quantised ones
    for given in (value, *inputs):
        if given.dtype in QUANTIZED_DTYPES and given.quantization is None:
            raise Unsound(f"{node.name} computes on integers without a scale")
