"""Split attention: splits of a map's channels, as views [N, R, C, H, W] of it, multiplied by gates
that are a softmax over the splits, and added up (ResNeSt, SKNet). In memory such a view is the map,
so it is another name for it; where an operation that only torch knows reads it, a reshape is made.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from resfuse.kernels.engine.frontend.call_arguments import arguments
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
    x: Any = node.args[0]
    shape = tuple(node.meta["val"].shape)
    if read.is_map(x) and shape == tuple(x.meta["val"].shape):
        read.same(node, x)
    elif read.is_map(x) and x.meta["val"].dim() == 4 and _are_splits(x.meta["val"].shape, shape):
        read.splits[node] = read.names[x]
    elif x in read.splits and shape == read.values[read.splits[x]].shape:
        read.names[node] = read.splits[x]
    else:
        return _softmax_of_views(read, node) or add_shuffle(read, node)
    return True


def _are_splits(of: Sequence[int], shape: Sequence[int]) -> bool:
    """Returns whether a shape is that of splits of a map."""
    n, channels, *pixels = of
    return len(shape) == 5 and tuple(shape) == (n, shape[1], channels // shape[1], *pixels)


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
    where they change the order of channels: ResNeSts transpose cardinality and radix."""
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
    of_x, shape = tuple(x.meta["val"].shape), tuple(node.meta["val"].shape)
    splits = _are_splits(of_x, shape)
    if not splits and shape not in (of_x, of_x[:2]):
        return False
    found = _splits_of(softmax, of_x, before, after)
    if found is None:
        return False
    radix, channels = found
    name = read.names[x]
    if channels != tuple(range(of_x[1])):
        pick = Node(f"{node.name}:order", Pick((0,), (0,), channels=channels), (name,))
        read.values[pick.name] = read.values[name]
        read.nodes.append(pick)
        name = pick.name
    if splits:
        _add(read, node, SplitSoftmax(radix), of_x, (name,))
    else:
        read.add_value(node, node.name)
        read.nodes.append(Node(node.name, SplitSoftmax(radix), (name,)))
    return True


def _splits_of(
    softmax: Any, shape: tuple[int, ...], before: Sequence[fx.Node], after: Sequence[fx.Node]
) -> tuple[int, tuple[int, ...]] | None:
    """Returns the radix of a softmax between views, and the channel of its vectors that each result
    is of; None where it is not over splits of the results, or where images mix.

    What is normalised together is found by applying the views to the numbers of the elements, and
    to those of the sums.
    """
    n, channels = shape[:2]
    elements = torch.arange(n * channels, device="cpu").reshape(shape)
    for view in reversed(before):
        elements = _viewed(view, elements)
    dim = softmax.args[1]
    radix = elements.shape[dim]
    sums = torch.arange(elements.numel() // radix, device="cpu")
    sums = sums.reshape(elements.select(dim, 0).shape).unsqueeze(dim).expand_as(elements)
    elements, sums = elements.contiguous(), sums.contiguous()  # as a softmax is
    for view in reversed(after):
        elements, sums = _viewed(view, elements), _viewed(view, sums)
    elements = elements.reshape(n, channels) - channels * torch.arange(n, device="cpu")[:, None]
    order = elements[0]
    apart = 0 <= order.min() <= order.max() < channels and bool((elements == order).all())
    if not apart or channels % radix:
        return None
    sums = sums.reshape(n, radix, channels // radix)
    return (radix, tuple(order.tolist())) if bool((sums == sums[:, :1]).all()) else None


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
    gated: dict[str, Node] = {}
    gone: set[str] = set()
    for node in graph.nodes:
        if isinstance(node.op, SplitSum):
            product = makers.get(node.inputs[0])
            alone = product is not None and graph.readers[product.name] == 1
            if product is not None and alone and product.op == Affine(gate=True):
                op = SplitSum(node.op.radix, gate=True)
                gated[node.name] = Node(node.name, op, product.inputs)
                gone.add(product.name)
    nodes = [gated.get(node.name, node) for node in graph.nodes if node.name not in gone]
    return replace(graph, nodes=tuple(nodes))


def pool_before_sums(graph: Graph) -> Graph:
    """Makes the mean of a sum of splits the sum of their means, so that the sum is of a pixel."""
    makers = {node.name: node for node in graph.nodes}
    nodes, values = list(graph.nodes), dict(graph.values)
    for node in graph.nodes:
        summed = makers.get(node.inputs[0]) if isinstance(node.op, Mean) else None
        if summed is None or not isinstance(summed.op, SplitSum) or summed.op.gate:
            continue
        if graph.readers[summed.name] == 1:
            n, channels, *one = values[node.name].shape
            mean = Node(f"{node.name}:splits", Mean(), summed.inputs)
            shape = n, summed.op.radix * channels, *one
            values[mean.name] = replace(values[node.name], shape=shape)
            at = nodes.index(node)
            nodes[at : at + 1] = [mean, Node(node.name, summed.op, (mean.name,))]
            nodes.remove(summed)
    return replace(graph, nodes=tuple(nodes), values=values)
