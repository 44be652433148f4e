"""Which tensors of the state a graph needs, and which of them it reads whenever it runs."""

from collections.abc import Sequence
from typing import Any

from resfuse.kernels.engine.ir.graph import (
    Affine,
    Conv,
    Finished,
    Graph,
    GroupNorm,
    LayerNorm,
    Node,
    Operation,
    Torch,
)


def state_names(graph: Graph) -> set[str]:
    """Returns the names of the state that the graph needs, without those that it derives."""
    nodes = (*graph.nodes, *graph.derived)
    derived = {node.name for node in graph.derived}
    return {name for node in nodes for name in node_state(node)} - derived


def node_state(node: Node) -> set[str]:
    """Returns the names of the state that a node needs."""
    op, names = node.op, set[str | None]()
    if isinstance(op, Conv):
        names.update((op.weight, op.bias, op.correction))
    if isinstance(op, Conv | Affine) and op.norm is not None:
        names.update((op.norm.mean, op.norm.var, op.norm.weight, op.norm.bias))
    if isinstance(op, LayerNorm | GroupNorm):
        names.update((op.weight, op.bias))
    return {name for name in names if name is not None}.union(state_read_by(op))


def read_at_calls(graph: Graph) -> set[str]:
    """Returns the names of the state that is read as it is when the graph runs, or by what is
    derived, which may be a view; the rest is folded and laid out."""
    return {name for node in (*graph.nodes, *graph.derived) for name in state_read_by(node.op)}


def state_read_by(op: Operation) -> tuple[str, ...]:
    """Returns the names of the state that an operation reads whenever it runs, in its order."""
    if isinstance(op, Finished):
        return (op.slope,) if isinstance(op.slope, str) else ()
    return _named_in([*op.args, *dict(op.kwargs).values()]) if isinstance(op, Torch) else ()


def _named_in(args: Sequence[Any]) -> tuple[str, ...]:
    found: list[str] = []
    for arg in args:
        if isinstance(arg, dict) and "state" in arg:
            found.append(arg["state"])
        elif isinstance(arg, list | tuple):
            found += _named_in(arg)
    return tuple(found)
