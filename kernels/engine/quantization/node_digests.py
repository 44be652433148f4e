"""Digests of a graph's nodes, which tell one model from another whatever the batch size, dtype and
machine."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from resfuse.kernels.engine.frontend.batching.any_batch import unsized
from resfuse.kernels.engine.ir.graph import Conv, Graph, MaxPool, Node, Norm, Pick

_DIGITS = 16  # of each node's SHA-256


def node_digests(graph: Graph) -> dict[str, str]:
    """Returns a digest for each node, by name and in the graph's order: of what it computes, the
    size of images included, what it reads, and the names of its weights."""
    constants = {*graph.constants, *(node.name for node in graph.derived)}
    return {node.name: _digest(node, constants) for node in graph.nodes}


def _digest(node: Node, constants: Collection[str]) -> str:
    described = json.dumps([_described(node, constants), node.inputs], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:_DIGITS]


def _described(node: Node, constants: Collection[str]) -> Any:
    """Returns an operation as JSON's types."""
    op = unsized(node.op)
    if isinstance(op, str):
        return op
    plain: dict[str, Any] = {"kind": type(op).__name__}
    if isinstance(op, Conv):
        problem = op.problem.to_plain()
        del problem["math_mode"]
        plain |= {"problem": problem, "residual_last": op.residual_last, "weight": op.weight,
                  "bias": op.bias, "slope": op.slope, "norm": _norm(op.norm)}  # fmt: skip
    else:
        plain |= asdict(op)
        if isinstance(op, MaxPool) and op.padding_after is None:
            del plain["padding_after"]  # as before there was any
        if isinstance(op, Pick) and not any(op.around):
            del plain["around"]  # likewise
    return _plain(plain, constants)


def _norm(norm: Norm | None) -> Mapping[str, Any] | None:
    return None if norm is None else asdict(norm)


def _plain(item: Any, constants: Collection[str]) -> Any:
    """Returns nested data with the names of constants, and of what is derived, cut before the hash,
    which may depend on the batch."""
    if isinstance(item, Mapping):
        return {str(key): _plain(value, constants) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return [_plain(value, constants) for value in item]
    if isinstance(item, str) and item in constants:
        return item.rpartition(":")[0] or item
    return item
