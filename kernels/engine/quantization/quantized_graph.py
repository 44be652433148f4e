"""Quantisation: a pass that has a graph in float32 computed on 8-bit integers.

Convolutions and linear layers are computed in int8, but for those to keep. Pools, sums, gates and
concatenations between them, and what only moves values, follow what they read; whatever else there
is sees float32. A convolution that float32 alone reads, as a classifier's last layer, stores
float32 itself. Values that are moved, picked as maxima or concatenated share one scale with what
they become, so that a part of a concatenation can be computed in its place.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

import networkx
import torch
from torch import Tensor

from resfuse.kernels.engine.frontend.conversions import Rewriter, moves
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Graph,
    MaxPool,
    Mean,
    Node,
    Pick,
    State,
    Torch,
    Value,
)
from resfuse.kernels.engine.quantization.bias_correction import bias_correction
from resfuse.kernels.engine.quantization.ranges import Ranges
from resfuse.kernels.engine.quantization.unseen_ranges import unseen_ranges
from resfuse.kernels.ops.conv_problem import dtypes_of
from resfuse.kernels.ops.quantization import STORED_ON, Quantization


def quantized(
    graph: Graph,
    state: State,
    ranges: Ranges,
    kept: Collection[str],
    stored_as: torch.dtype = torch.uint8,
) -> tuple[Graph, dict[str, Tensor]]:
    """Returns a graph that computes nearly the same in int8, and what it needs in addition to the
    state: each convolution's correction of its bias.

    Args:
        ranges: of the values of `graph`.
        kept: the names of the weights of convolutions and linear layers to compute in float32.
        stored_as: the dtype of quantised values, uint8 or, less 128, int8.

    Raises:
        ValueError: the ranges are those of another model.
    """
    ranges.require_fits(graph)
    chosen = _computed_in_int8(graph, kept)
    scales = _shared_scales(graph, chosen, ranges)
    corrections: dict[str, Tensor] = {}
    rewriter = Rewriter(graph)
    for node in graph.nodes:
        values, op = graph.values, node.op
        inputs, value = {name: values[name] for name in node.inputs}, values[node.name]
        if node.name in chosen:
            inputs = {n: Value(values[n].shape, stored_as, scales[n]) for n in node.inputs}
            stored = not _may_store_float32(node) or _is_read_in_int8(graph, node, chosen)
            if stored:
                value = Value(value.shape, stored_as, scales[node.name])
            if isinstance(op, Conv):
                correction = f"{node.name}:correction"
                corrections[correction] = bias_correction(graph, state, ranges, node.name).float()
                dtypes = dtypes_of("int8" if stored else "int8_fp32")
                problem = replace(op.problem, dtypes=dtypes)
                op = replace(op, problem=problem, correction=correction)
        rewriter.add(node, op, inputs, value)
    constants = (*graph.constants, *corrections)
    return replace(rewriter.finished(), constants=constants), corrections


def unseen_int8(graph: Graph, state: State) -> tuple[Graph, dict[str, Tensor]]:
    """Returns what `quantized` makes of a graph for a GPU, with ranges that no image was seen for:
    to plan and to compile ahead, not to compute."""
    return quantized(graph, state, unseen_ranges(graph), (), STORED_ON["cuda"])


def _computed_in_int8(graph: Graph, kept: Collection[str]) -> set[str]:
    """Returns the names of the nodes that are computed in int8."""
    chosen: set[str] = set()
    for node in graph.nodes:
        captured = {graph.values[name].dtype for name in (*node.inputs, node.name)}
        if captured != {torch.float32}:
            continue
        if isinstance(node.op, Conv):
            follows = node.op.weight not in kept
        elif isinstance(node.op, Torch):
            follows = moves(node) and node.inputs[0] in chosen
        else:
            known = isinstance(node.op, MaxPool | AveragePool | Pick | Mean | Concat | Affine)
            follows = known and any(name in chosen for name in node.inputs)
        if follows:
            chosen.add(node.name)
    return chosen


def _may_store_float32(node: Node) -> bool:
    """Returns whether a node on quantised values may have a float32 result: there are native steps
    for it, but none that add a residual."""
    return isinstance(node.op, Conv | Mean | Affine) and node.residual is None


def _is_read_in_int8(graph: Graph, node: Node, chosen: Collection[str]) -> bool:
    return any(node.name in other.inputs for other in graph.nodes if other.name in chosen)


def _shared_scales(
    graph: Graph, chosen: Collection[str], ranges: Ranges
) -> Mapping[str, Quantization]:
    """Returns the quantisation of every value that a node in int8 reads or computes."""
    related = networkx.Graph()
    for node in graph.nodes:
        if node.name in chosen:
            related.add_nodes_from((*node.inputs, node.name))
            if isinstance(node.op, MaxPool | Pick | Concat | Torch):
                related.add_edges_from((name, node.name) for name in node.inputs)
    scales: dict[str, Quantization] = {}
    for names in networkx.connected_components(related):
        scales |= dict.fromkeys(names, ranges.shared_quantization(names))
    return scales
