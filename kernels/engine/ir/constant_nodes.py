"""constant_nodes: finds the nodes of a graph that depend on its weights and constants alone."""

from functools import cache

from resfuse.kernels.engine.ir.graph import Graph, Operation, Torch
from resfuse.kernels.engine.ir.torch_operations import draws, is_pure


def constant_nodes(graph: Graph) -> frozenset[str]:
    """Returns the names of the nodes whose values are the same in every call: those that read
    nothing but the state and other such values, if they are known to only compute.

    A model in eval mode often computes such values once (LeViT's attention biases, ConViT's
    positions), and an exported graph would compute them in every call.
    """
    found: set[str] = set()
    for node in graph.nodes:
        if found.issuperset(node.inputs) and _only_computes(node.op):
            found.add(node.name)
    return frozenset(found)


def _only_computes(op: Operation) -> bool:
    return not isinstance(op, Torch) or (_is_known(op.target) and not draws(op))


@cache  # a name is looked up in the dispatcher
def _is_known(target: str) -> bool:
    return is_pure(target)
