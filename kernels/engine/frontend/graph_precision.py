"""Precision: a pass that has a graph in float32 computed in bfloat16.

Convolutions and linear layers are computed in bfloat16, but for those to keep. Other operations
follow what they read: they are computed in bfloat16 where one of their inputs is. Of torch's own
operations only those do which move values or round each of them once; all others see float32.
Where dtypes meet, a `Convert` is inserted before the first reader.
"""

from collections.abc import Collection
from dataclasses import replace

import torch

from resfuse.kernels.engine.frontend.conversions import MOVE, Rewriter
from resfuse.kernels.engine.ir.graph import Conv, Graph, Node, Torch, Value
from resfuse.kernels.engine.ir.graph_state import state_read_by
from resfuse.kernels.ops.asked_precision import Precision
from resfuse.kernels.ops.conv_problem import dtypes_of

# Operations of torch's, of one tensor, that compute each value from one in float32 and round it
# once.
_ROUND_ONCE = """
    abs clamp clamp_max clamp_min elu gelu hardsigmoid hardswish hardtanh leaky_relu mish neg relu
    relu6 sigmoid silu softplus tanh
"""
_FOLLOW = MOVE.union(_ROUND_ONCE.split())


def in_precision(graph: Graph, precision: Precision) -> Graph:
    """Returns a graph that computes the same in that precision.

    Raises:
        ValueError: a pattern of `precision.keep` matches no convolution or linear layer.
    """
    if precision.name != "bf16":
        return graph
    kept = precision.kept([node.op.weight for node in graph.nodes if isinstance(node.op, Conv)])
    rewriter = Rewriter(graph)
    for node in graph.nodes:
        values, op = graph.values, node.op
        inputs, value = {name: values[name] for name in node.inputs}, values[node.name]
        if _in_bf16(rewriter, node, kept):
            inputs = {name: replace(v, dtype=torch.bfloat16) for name, v in inputs.items()}
            value = Value(value.shape, torch.bfloat16)
            if isinstance(op, Conv):
                op = replace(op, problem=replace(op.problem, dtypes=dtypes_of("bf16")))
        rewriter.add(node, op, inputs, value)
    return rewriter.finished()


def _in_bf16(rewriter: Rewriter, node: Node, kept: Collection[str]) -> bool:
    """Returns whether a node is to be computed in bfloat16."""
    captured = {rewriter.graph.values[name].dtype for name in (*node.inputs, node.name)}
    if captured != {torch.float32}:
        return False
    if isinstance(node.op, Conv):
        return node.op.weight not in kept
    if isinstance(node.op, Torch):
        namespace, name, *_ = node.op.target.split(".")
        of_one = len(node.inputs) == 1 and not state_read_by(node.op)  # which may be in float32
        if namespace != "aten" or name not in _FOLLOW or not of_one:
            return False
    return any(rewriter.values[name].dtype == torch.bfloat16 for name in node.inputs)
