"""Counts the least that a part of a graph computes and moves: the FLOPs of its convolutions, and
the bytes of its weights, inputs and outputs, each once and without pixels that strides skip.
"""

from dataclasses import dataclass
from math import prod

from resfuse.kernels.engine.ir.graph import Conv, Graph


@dataclass(frozen=True)
class Cost:
    """The FLOPs and bytes of one run."""

    flops: int
    moved: int  # bytes


def cost_of(part: Graph) -> Cost:
    """Returns the cost of a part, with FLOPs of direct convolution; Winograd's needs fewer."""
    flops = weights = 0
    for node in part.nodes:
        if isinstance(node.op, Conv):
            problem = node.op.problem
            size, (k, *summed) = problem.dtypes.weight.itemsize, problem.weight_shape
            flops += problem.flops
            weights += size * k * prod(summed)
            weights += k * (8 if problem.is_quantized else size)  # bias; in int8 a scale, too
    read = sum(_read_bytes(part, name) for name in part.reads)
    written = sum(_bytes(part, name) for name in part.outputs)
    return Cost(flops, weights + read + written)


def _read_bytes(part: Graph, name: str) -> int:
    """Returns the bytes that are read of an input: those of the pixels that some node needs."""
    readers = [node for node in part.nodes if name in node.inputs]
    seen = [
        node.op.problem.pixels_read
        if isinstance(node.op, Conv) and node.residual != name and len(part.values[name].shape) == 4
        else 1.0
        for node in readers
    ]
    return round(_bytes(part, name) * max(seen, default=1.0))


def _bytes(part: Graph, name: str) -> int:
    value = part.values[name]
    return prod(value.shape) * value.dtype.itemsize
