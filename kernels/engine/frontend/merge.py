"""Passes over a captured graph, which leave the nodes that the engine plans with. Convolutions and
norms take in the norm, activation or sum that follows them, where the value between has no other
reader; max-pools take in the padding before them, other padding becomes a pick, and picks of picks
become one; gates of splits, and means of their sums, are put where they cost least.
"""

from collections.abc import Callable
from dataclasses import replace

from resfuse.kernels.engine.frontend.pool_padding import pad_in_pools
from resfuse.kernels.engine.frontend.split_attention import gate_in_sums, pool_before_sums
from resfuse.kernels.engine.frontend.zero_padding import pad_by_picks
from resfuse.kernels.engine.ir.graph import (
    Affine,
    Conv,
    Finished,
    Graph,
    GroupNorm,
    Node,
    Norm,
    Pick,
)


def merge(graph: Graph) -> Graph:
    """Returns the same computation in fewer nodes, by all passes in order."""
    for transform in PASSES:
        graph = transform(graph)
    return graph


def merge_followers(graph: Graph) -> Graph:
    """Merges each norm, activation, sum and pick into the node before it where that is possible."""
    nodes, at = list(graph.nodes), 0
    while at < len(nodes):
        merged = _merge_at(replace(graph, nodes=tuple(nodes)), at)
        if merged is None:
            at += 1
        else:
            nodes, at = merged
    return replace(graph, nodes=tuple(nodes))


def _merge_at(graph: Graph, at: int) -> tuple[list[Node], int] | None:
    """Returns the nodes with node `at` merged into an earlier one, and the position to go on from;
    None where it cannot be merged."""
    node = graph.nodes[at]
    if not isinstance(node.op, Affine):
        return None
    producers = {node.name: i for i, node in enumerate(graph.nodes[:at])}
    found = [
        (producer, op)
        for name in dict.fromkeys(node.inputs)
        if (producer := producers.get(name)) is not None and graph.readers[name] == 1
        if (op := _joined(graph.nodes[producer], node)) is not None
    ]
    if not found:
        return None
    # Of the two branches of a sum, the convolution of the residual branch takes it in: its input
    # has no other reader, while a projection reads the block's input. So conv 3x3 and conv 1x1 +
    # sum stay neighbours.
    producer, op = max(found, key=lambda f: (graph.readers[graph.nodes[f[0]].inputs[0]] == 1, f[0]))
    first = graph.nodes[producer]
    residual = [name for name in node.inputs if name != first.name]
    merged = Node(node.name, op, (*first.inputs, *residual))
    nodes = [n for i, n in enumerate(graph.nodes) if i not in (producer, at)]
    nodes.insert(at - 1, merged)
    return nodes, at - 1


def _joined(first: Node, second: Node) -> Finished | None:
    """Returns one operation that computes both nodes, None where there is none."""
    op, then = first.op, second.op
    assert isinstance(then, Affine)
    if then.gate:
        return None
    things = (then.norm is not None) + then.residual + (then.activation != "identity")
    if things > 1 or not isinstance(op, Finished):  # several have their own order
        return None
    if then.residual and len(set(second.inputs)) == 1:
        return None
    ended = op.activation != "identity"
    if then.norm is not None:
        if first.residual is not None or ended or isinstance(op, GroupNorm):
            return None
        if op.norm is None:
            return replace(op, norm=then.norm) if isinstance(op, Conv) else None
        norm = _scale_and_shift(op.norm, then.norm)
        return None if norm is None else replace(op, norm=norm)
    if then.residual:
        return None if first.residual is not None else op.with_residual()
    if ended:
        return None
    return op.with_activation(then.activation, then.slope)


def _scale_and_shift(first: Norm, second: Norm) -> Norm | None:
    """Returns a scale and the shift behind it as one norm, None for other norms."""
    scales = first == Norm(None, None, first.weight, None, 0.0)
    shifts = second == Norm(None, None, None, second.bias, 0.0)
    return replace(first, bias=second.bias) if scales and shifts else None


def join_picks(graph: Graph) -> Graph:
    """Makes each pick of a pick one of what that reads, however many read the first one."""
    nodes: list[Node] = []
    picks: dict[str, tuple[Pick, tuple[str, ...]]] = {}  # and what each reads
    for node in graph.nodes:
        op, inputs = node.op, node.inputs
        if isinstance(op, Pick):
            if inputs[0] in picks:
                first, read = picks[inputs[0]]
                joined = first.then(op)
                op, inputs = (op, inputs) if joined is None else (joined, read)
            picks[node.name] = op, inputs
        nodes.append(Node(node.name, op, inputs))
    return replace(graph, nodes=tuple(nodes))


def move_projections(graph: Graph) -> Graph:
    """Moves a projection shortcut's 1x1 convolution directly before the one convolution that adds
    it, so that both can be one segment. Its input has been computed by then in any order.
    """
    adders = {node.residual: node for node in graph.nodes if isinstance(node.op, Conv)}
    moved = {
        id(adders[node.name]): node
        for node in graph.nodes
        if node.name in adders and _is_plain_1x1(node) and graph.readers[node.name] == 1
    }
    names = {node.name for node in moved.values()}
    nodes = [
        placed
        for node in graph.nodes
        if node.name not in names
        for placed in ([moved[id(node)], node] if id(node) in moved else [node])
    ]
    return replace(graph, nodes=tuple(nodes))


def _is_plain_1x1(node: Node) -> bool:
    op = node.op
    if not isinstance(op, Conv) or op.problem.residual or op.activation != "identity":
        return False
    return (op.problem.r, op.problem.s) == (1, 1)


def drop_unread(graph: Graph) -> Graph:
    """Drops the nodes whose results are not read."""
    read = set(graph.outputs)
    needed: list[Node] = []
    for node in reversed(graph.nodes):
        if node.name in read:
            read.update(node.inputs)
            needed.append(node)
    return replace(graph, nodes=tuple(needed[::-1]))


def drop_values(graph: Graph) -> Graph:
    """Drops the values that no remaining node computes or reads."""
    names = dict.fromkeys(n for node in graph.nodes for n in (*node.inputs, node.name))
    values = {name: graph.values[name] for name in [graph.input, *names]}
    return replace(graph, values=values)


PASSES: tuple[Callable[[Graph], Graph], ...] = (
    pad_in_pools,
    pad_by_picks,
    join_picks,
    drop_unread,
    gate_in_sums,
    pool_before_sums,
    merge_followers,
    move_projections,
    drop_values,
)
