"""Padding of maps with zeros, as a pick of all pixels with zeros around them: in front of
convolutions that pad one side more than the other, as TensorFlow's "same" does, and of BiT's
max-pool.
"""

from dataclasses import replace

from resfuse.kernels.engine.frontend.pool_padding import constant_padding
from resfuse.kernels.engine.ir.graph import Graph, Node, Pick, Torch
from resfuse.kernels.ops.conv_problem import MATH_MODES

_COMPUTED = tuple(dtype for dtype, _ in MATH_MODES.values())


def pad_by_picks(graph: Graph) -> Graph:
    """Makes each padding of a map with zeros a Pick, where another operation than torch's makes or
    reads it."""
    torchs = {node.name for node in graph.nodes if isinstance(node.op, Torch)}
    read = {name for node in graph.nodes if node.name not in torchs for name in node.inputs}
    nodes = []
    for node in graph.nodes:
        padding = constant_padding(node)
        if padding is not None and (node.name in read or node.inputs[0] not in torchs):
            op = _pick(graph, node, *padding)
            node = node if op is None else Node(node.name, op, node.inputs)
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _pick(graph: Graph, node: Node, sides: tuple[int, int, int, int], fill: float) -> Pick | None:
    """Returns the pick that pads as a node does, None where there is none."""
    x = graph.values[node.inputs[0]]
    if fill != 0 or min(sides) < 0 or len(x.shape) != 4 or x.dtype not in _COMPUTED:
        return None
    rows, columns = (tuple(range(size)) for size in x.shape[2:])
    return Pick(rows, columns, around=sides)
