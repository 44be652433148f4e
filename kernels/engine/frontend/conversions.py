"""Rewriter: builds a graph anew with some of its values in other dtypes, and has a `Convert` before
the first reader of a value in a dtype that it is not computed in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from resfuse.kernels.engine.ir.graph import Convert, Graph, Node, Operation, Torch, Value

# Operations of torch's, of one tensor, that move values.
_MOVE = """
    alias channel_shuffle chunk clone contiguous expand flatten flip narrow permute pixel_shuffle
    pixel_unshuffle reshape roll select slice split split_with_sizes squeeze transpose unflatten
    unsqueeze view
"""
MOVE = frozenset(_MOVE.split())
_SHORT: Mapping[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "s8",
}


def moves(node: Node) -> bool:
    """Returns whether a node is an operation of torch's that only moves values of one tensor."""
    if not isinstance(node.op, Torch) or len(node.inputs) != 1:
        return False
    namespace, name, *_ = node.op.target.split(".")
    return namespace == "aten" and name in MOVE


@dataclass
class Rewriter:
    """Takes a graph's nodes in order, each with the values that it is to read and to compute."""

    graph: Graph
    nodes: list[Node] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    _converted: dict[tuple[str, torch.dtype], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values |= {name: self.graph.values[name] for name in self.graph.reads}

    def add(self, node: Node, op: Operation, inputs: Mapping[str, Value], value: Value) -> None:
        """Adds a node that reads each input as the value given for it and computes `value`."""
        names = tuple(self.converted(name, inputs[name]) for name in node.inputs)
        self.nodes.append(Node(node.name, op, names))
        self.values[node.name] = value

    def converted(self, name: str, wanted: Value) -> str:
        """Returns the name of a value in a dtype, and quantised so, converted if need be."""
        value = self.values[name]
        if (value.dtype, value.quantization) == (wanted.dtype, wanted.quantization):
            return name
        key = name, wanted.dtype
        if key not in self._converted:
            self._converted[key] = to = f"{name}:{_SHORT[wanted.dtype]}"
            op = Convert(str(wanted.dtype).removeprefix("torch."))
            self.nodes.append(Node(to, op, (name,)))
            self.values[to] = replace(wanted, shape=value.shape)
        return self._converted[key]

    def finished(self) -> Graph:
        """Returns the graph, whose outputs have the dtypes that they had."""
        graph = self.graph
        outputs = tuple(self.converted(name, graph.values[name]) for name in graph.outputs)
        return replace(graph, nodes=tuple(self.nodes), values=self.values, outputs=outputs)
