"""Split attention: splits of a map's channels, as views [N, R, C, H, W] of it, multiplied by gates
that are a softmax over the splits, and added up (ResNeSt, SKNet). In memory such a view is the map,
so it is another name for it; where an operation that only torch knows reads it, a reshape is made.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from resfuse.kernels.engine.frontend.arguments import arguments
from resfuse.kernels.engine.frontend.channel_picks import VIEWS, add_shuffle
from resfuse.kernels.engine.frontend.graph_builder import Captured
from resfuse.kernels.engine.ir.graph import (
    Affine,
    Concat,
    Graph,
    Mean,
    Node,
    Operation,
    Pick,
    SplitSoftmax,
    SplitSum,
    Value,
)

aten = torch.ops.aten


def add_view(read: Captured, node: fx.Node) -> bool:
    """Adds a view that changes nothing, makes splits of a map or a map of splits, is the last one
    behind a softmax over splits, or shuffles channels."""
    x, shape = node.args[0], tuple(node.meta["val"].shape)
    if read.is_map(x) and shape == tuple(x.meta["val"].shape):
        read.same(node, x)
        return True
    if read.is_map(x) and x.meta["val"].dim() == 4:
        n, channels, *pixels = x.meta["val"].shape
        if len(shape) == 5 and shape == (n, shape[1], channels // shape[1], *pixels):
            read.splits[node] = read.names[x]
            return True
    if isinstance(x, fx.Node) and x in read.splits and shape == read.values[read.splits[x]].shape:
        read.names[node] = read.splits[x]
        return True
    return _softmax_of_views(read, node) or add_shuffle(read, node)


def add_stack(read: Captured, node: fx.Node) -> bool:
    """Adds maps stacked behind the batch as their concatenation, in splits."""
    parts, *dim = arguments(node)
    alike = len({part.meta["val"].shape for part in parts if isinstance(part, fx.Node)}) == 1
    if dim not in ([1], [-4]) or node.kwargs or not alike or not all(map(read.is_map, parts)):
        return False
    n, splits, channels, *pixels = node.meta["val"].shape
    if len(pixels) != 2:
        return False
    names = tuple(read.names[part] for part in parts)
    _add(read, node, Concat(), (n, splits * channels, *pixels), names)
    return True


def add_gated_splits(read: Captured, node: fx.Node, x: Any, gate: Any) -> bool:
    """Adds splits times a number for each of their channels as a gate of their map."""
    if node.kwargs or not all(isinstance(v, fx.Node) and v in read.splits for v in (x, gate)):
        return False
    of_x, of_gate = x.meta["val"], gate.meta["val"]
    names = read.splits[x], read.splits[gate]
    if of_gate.shape != (*of_x.shape[:3], 1, 1) or of_gate.dtype != of_x.dtype:
        return False
    if names[0] == names[1]:
        return False
    _add(read, node, Affine(gate=True), read.values[names[0]].shape, names)
    return True


def add_split_sum(read: Captured, node: fx.Node) -> bool:
    """Adds the sum of splits."""
    x, dims, *keepdim = arguments(node)
    if not (isinstance(x, fx.Node) and x in read.splits) or node.kwargs or any(keepdim):
        return False
    if list(dims) not in ([1], [-4]) or node.meta["val"].dtype != x.meta["val"].dtype:
        return False
    read.add_value(node, node.name)
    read.nodes.append(Node(node.name, SplitSum(x.meta["val"].shape[1]), (read.splits[x],)))
    return True


def add_split_softmax(read: Captured, node: fx.Node) -> bool:
    """Adds a softmax over splits."""
    x, dim, *dtype = arguments(node)
    if not (isinstance(x, fx.Node) and x in read.splits) or dim not in (1, -4):
        return False
    if node.kwargs or dtype not in ([], [None]):
        return False
    name = read.splits[x]
    _add(read, node, SplitSoftmax(x.meta["val"].shape[1]), read.values[name].shape, (name,))
    return True


def _add(
    read: Captured, node: fx.Node, op: Operation, shape: tuple[int, ...], inputs: tuple[str, ...]
) -> None:
    """Adds an operation that makes a map of a shape, of which `node` is a view in splits."""
    read.splits[node] = node.name
    read.values[node.name] = Value(tuple(shape), node.meta["val"].dtype)
    read.nodes.append(Node(node.name, op, inputs))


def _softmax_of_views(read: Captured, node: fx.Node) -> bool:
    """Adds views of a softmax of views of a vector [N, K, 1, 1] as a SplitSoftmax, behind a Pick
    where they change the order of channels: ResNeSts transpose cardinality and radix.

    What is normalised together is found by applying the views to the numbers of the elements, and
    to those of the sums.
    """
    after = _views_up_from(node)
    softmax: Any = after[-1].args[0]
    if not isinstance(softmax, fx.Node) or softmax.target is not aten.softmax.int:
        return False
    if softmax.kwargs or (len(softmax.args) > 2 and softmax.args[2] is not None):
        return False
    before = _views_up_from(softmax)[1:]
    x: Any = (before[-1] if before else softmax).args[0]
    if not read.is_map(x) or x.meta["val"].shape[2:] != (1, 1):
        return False
    (n, channels), shape = x.meta["val"].shape[:2], tuple(node.meta["val"].shape)
    splits = len(shape) == 5 and shape == (n, shape[1], channels // shape[1], 1, 1)
    if not splits and shape not in ((n, channels), (n, channels, 1, 1)):
        return False
    elements = torch.arange(n * channels, device="cpu").reshape(n, channels, 1, 1)
    for view in reversed(before):
        elements = _viewed(view, elements)
    dim: Any = softmax.args[1]
    radix = elements.shape[dim]
    sums = torch.arange(elements.numel() // radix, device="cpu")
    sums = sums.reshape(elements.select(dim, 0).shape).unsqueeze(dim).expand_as(elements)
    elements, sums = elements.contiguous(), sums.contiguous()  # as a softmax is
    for view in reversed(after):
        elements, sums = _viewed(view, elements), _viewed(view, sums)
    elements = elements.reshape(n, channels) - channels * torch.arange(n, device="cpu")[:, None]
    order = elements[0]
    if channels % radix or not 0 <= order.min() <= order.max() < channels:
        return False
    sums = sums.reshape(n, radix, channels // radix)
    if not torch.equal(elements, order.expand_as(elements)):
        return False
    if not torch.equal(sums, sums[:, :1].expand_as(sums)):
        return False
    name, picked = read.names[x], tuple(order.tolist())
    if picked != tuple(range(channels)):
        pick = Node(f"{node.name}:order", Pick((0,), (0,), channels=picked), (name,))
        read.values[pick.name] = read.values[name]
        read.nodes.append(pick)
        name = pick.name
    if splits:
        _add(read, node, SplitSoftmax(radix), (n, channels, 1, 1), (name,))
    else:
        read.add_value(node, node.name)
        read.nodes.append(Node(node.name, SplitSoftmax(radix), (name,)))
    return True


def _views_up_from(node: fx.Node) -> list[fx.Node]:
    """Returns a node and the views that it is made by, last first."""
    views = [node]
    while isinstance(source := views[-1].args[0], fx.Node) and source.target in VIEWS:
        views.append(source)
    return views


def _viewed(view: fx.Node, x: torch.Tensor) -> torch.Tensor:
    moved: torch.Tensor = view.target(x, *view.args[1:], **view.kwargs)  # type: ignore[operator]
    return moved


def gate_in_sums(graph: Graph) -> Graph:
    """Makes the sum of gated splits one operation, where the product has no other reader."""
    makers = {node.name: node for node in graph.nodes}
    nodes, gone = [], set()
    for node in graph.nodes:
        op, product = node.op, makers.get(node.inputs[0]) if node.inputs else None
        gated = product is not None and product.op == Affine(gate=True)
        if isinstance(op, SplitSum) and gated and graph.readers[product.name] == 1:
            node = Node(node.name, replace(op, gate=True), product.inputs)
            gone.add(product.name)
        nodes.append(node)
    return replace(graph, nodes=tuple(node for node in nodes if node.name not in gone))


def pool_before_sums(graph: Graph) -> Graph:
    """Makes the mean of a sum of splits the sum of their means, so that the sum is of a pixel."""
    makers = {node.name: node for node in graph.nodes}
    nodes, values, gone = [], dict(graph.values), set()
    for node in graph.nodes:
        summed = makers.get(node.inputs[0]) if isinstance(node.op, Mean) else None
        op = summed.op if summed is not None else None
        if isinstance(op, SplitSum) and not op.gate and graph.readers[summed.name] == 1:
            n, channels, *one = values[node.name].shape
            mean = Node(f"{node.name}:splits", Mean(), summed.inputs)
            values[mean.name] = replace(values[node.name], shape=(n, op.radix * channels, *one))
            nodes += [mean, Node(node.name, op, (mean.name,))]
            gone.add(summed.name)
        else:
            nodes.append(node)
    nodes = [node for node in nodes if node.name not in gone]
    return replace(graph, nodes=tuple(nodes), values=values)
