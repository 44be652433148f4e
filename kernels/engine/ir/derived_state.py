"""Derived state: what a network computes from its weights alone, as an NF-ResNet's standardised
weights, LeViT's attention biases or any parametrization. A model in eval mode often computes it
once, and an exported graph would compute it in every call. It is computed where weights are laid
out, and read like them, so that convolutions with such weights are convolutions like all others.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.graph import Graph, Node, State, Torch
from resfuse.kernels.engine.ir.graph_state import node_state, state_read_by
from resfuse.kernels.engine.ir.torch_call import torch_call
from resfuse.kernels.engine.ir.torch_operations import draws, is_pure


def is_derivable(op: Torch) -> bool:
    """Returns whether an operation that reads the state alone has the same result in every call: it
    is known to only compute, and draws no random numbers."""
    return is_pure(op.target) and not draws(op)


def derived_name(op: Torch) -> str:
    """Returns a name for what an operation makes of the state: that of the first tensor that it
    reads, and a hash of all that it does, so that equal names have equal numbers, whatever the
    graph."""
    first, *_ = *state_read_by(op), op.target
    stem, _, _ = first.partition(":")
    return f"{stem}:{hashlib.sha256(repr(op).encode()).hexdigest()[:12]}"


def derive(op: Torch, state: State) -> Tensor:
    """Returns what an operation makes of the state, also where the caller is under autocast, which
    would round it."""
    on_cpu, on_gpu = (torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda"))
    with torch.no_grad(), on_cpu, on_gpu:
        return torch_call(op, state)()


def with_derived(graph: Graph, state: State) -> State:
    """Returns the state with what the graph derives from it."""
    known = dict(state)
    for node in graph.derived:
        assert isinstance(node.op, Torch)
        known[node.name] = derive(node.op, known)
    return known


def needed(nodes: Iterable[Node], derived: Iterable[Node]) -> tuple[Node, ...]:
    """Returns those of the derived tensors that nodes read, directly or through others, in their
    order."""
    read = {name for node in nodes for name in node_state(node)}
    found: list[Node] = []
    for node in reversed([*derived]):
        if node.name in read:
            found.append(node)
            read |= node_state(node)
    return tuple(reversed(found))
