"""Ranges for a network that has seen no images, or has no weights: plans and kernels in int8 depend
on shapes, and hardly on scales.
"""

from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.quantization.node_digests import node_digests
from resfuse.kernels.engine.quantization.ranges import Ranges, ValueRange, channels_of

_LOW, _HIGH = -0.5, 1.0  # a zero point of 85: as any but 128, it has kernels correct their edges


def unseen_ranges(graph: Graph) -> Ranges:
    """Returns the same range for every value of a graph. To plan and to compile with, not to
    compute."""
    values = {}
    for name, value in graph.values.items():
        channels = channels_of(value.shape)
        means = None if channels is None else (0.0,) * channels
        values[name] = ValueRange(_LOW, _HIGH, 0.0, means)
    image = tuple(graph.values[graph.input].shape[1:])
    return Ranges("minmax", None, 0, image, tuple(node_digests(graph).items()), values)
