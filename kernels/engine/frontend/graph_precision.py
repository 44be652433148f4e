"""Precision: a pass that has a graph in float32 computed in bfloat16.

Convolutions and linear layers are computed in bfloat16, but for those to keep. Other operations
follow what they read: they are computed in bfloat16 where one of their inputs is. Of torch's own
operations only those do which move values or round each of them once; all others see float32.
Where dtypes meet, a `Convert` is inserted before the first reader.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from resfuse.kernels.engine.ir.graph import Conv, Convert, Graph, Node, Torch, Value
from resfuse.kernels.ops.asked_precision import Precision
from resfuse.kernels.ops.conv_problem import dtypes_of

# Operations of torch's, of one tensor, that move values, or compute each from one in float32 and
# round it once.
_MOVE = """
    alias channel_shuffle chunk clone contiguous expand flatten flip narrow permute pixel_shuffle
    pixel_unshuffle reshape roll select slice split split_with_sizes squeeze transpose unflatten
    unsqueeze view
"""
_ROUND_ONCE = """
    abs clamp clamp_max clamp_min elu gelu hardsigmoid hardswish hardtanh leaky_relu mish neg relu
    relu6 sigmoid silu softplus tanh
"""
_FOLLOW = frozenset((_MOVE + _ROUND_ONCE).split())


def in_precision(graph: Graph, precision: Precision) -> Graph:
    """Returns a graph that computes the same in that precision.

    Raises:
        ValueError: a pattern of `precision.keep` matches no convolution or linear layer.
    """
    if precision.name != "bf16":
        return graph
    layers = [node.op.weight for node in graph.nodes if isinstance(node.op, Conv)]
    return _Rewriter(graph).rewritten(precision.kept(layers))


@dataclass
class _Rewriter:
    graph: Graph
    nodes: list[Node] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    converted: dict[tuple[str, torch.dtype], str] = field(default_factory=dict)

    def rewritten(self, kept: Iterable[str]) -> Graph:
        graph, kept = self.graph, set(kept)
        self.values = {name: graph.values[name] for name in graph.reads}
        for node in graph.nodes:
            self._add(node, self._dtype(node, kept))
        outputs = tuple(self._as(name, graph.values[name].dtype) for name in graph.outputs)
        return replace(graph, nodes=tuple(self.nodes), values=self.values, outputs=outputs)

    def _dtype(self, node: Node, kept: set[str]) -> torch.dtype | None:
        """Returns the dtype that a node is computed in: bfloat16, or None as it was."""
        captured = {self.graph.values[name].dtype for name in (*node.inputs, node.name)}
        if captured != {torch.float32}:
            return None
        if isinstance(node.op, Conv):
            return None if node.op.weight in kept else torch.bfloat16
        if isinstance(node.op, Torch):
            namespace, name, *_ = node.op.target.split(".")
            if namespace != "aten" or name not in _FOLLOW or len(node.inputs) != 1:
                return None
        reads_bf16 = any(self.values[name].dtype == torch.bfloat16 for name in node.inputs)
        return torch.bfloat16 if reads_bf16 else None

    def _add(self, node: Node, dtype: torch.dtype | None) -> None:
        value, op = self.graph.values[node.name], node.op
        inputs = tuple(self._as(n, dtype or self.graph.values[n].dtype) for n in node.inputs)
        if dtype is not None:
            value = Value(value.shape, dtype)
            if isinstance(op, Conv):
                op = replace(op, problem=replace(op.problem, dtypes=dtypes_of("bf16")))
        self.nodes.append(Node(node.name, op, inputs))
        self.values[node.name] = value

    def _as(self, name: str, dtype: torch.dtype) -> str:
        """Returns the name of a value in a dtype, converted if need be."""
        value = self.values[name]
        if value.dtype == dtype:
            return name
        key = name, dtype
        if key not in self.converted:
            self.converted[key] = to = f"{name}:{_SHORT[dtype]}"
            self.nodes.append(Node(to, Convert(str(dtype).removeprefix("torch.")), (name,)))
            self.values[to] = Value(value.shape, dtype)
        return self.converted[key]


_SHORT: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
