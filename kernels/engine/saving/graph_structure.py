"""Checks that a graph read from a file is well formed: the types of its fields, the sizes of its
values, nodes that read only what earlier ones compute, and the containers of its result.
"""

import json
import math
import os
import types
import typing
from dataclasses import is_dataclass
from typing import Any

from resfuse.kernels.engine.ir.graph import Graph, Torch

_MOST_NODES = 10_000  # ResNet-1202 has 1,900 once merged
_MOST = 2**31  # of any size, stride, padding
_CONTAINERS = ("builtins.list", "builtins.tuple", "builtins.dict", "collections.OrderedDict")


class Unsound(ValueError):
    """Says what in a plan read from a file build_engine would not have made."""


def require_wired(graph: Graph) -> None:
    """Raises Unsound unless fields have the types that graph.py declares, values fit in memory, and
    every node reads only the input and results of earlier nodes."""
    if (count := len(graph.nodes) + len(graph.derived)) > _MOST_NODES:
        raise Unsound(f"{count} nodes; at most {_MOST_NODES}")
    names = (graph.input, *graph.outputs, *graph.constants, graph.spec)
    if not all(isinstance(name, str) for name in names) or not graph.input:
        raise Unsound("names that are no text")
    if graph.layout is not None:
        rank = len(graph.values[graph.input].shape)
        numbers = all(type(n) is int and n >= 0 for n in graph.layout)
        if not numbers or len(graph.layout) not in (rank, rank + 1):
            raise Unsound(f"an input that lies as {graph.layout}")
    memory = memory_bytes()
    for name, value in graph.values.items():
        if not all(type(n) is int and 0 <= n < _MOST for n in value.shape):
            raise Unsound(f"value {name} has shape {value.shape}")
        if math.prod(value.shape) * value.dtype.itemsize > memory:
            raise Unsound(f"value {name} is larger than this machine's memory")
    for node in graph.derived:
        _require_types(str(node.name), node.op)
        if not isinstance(node.op, Torch) or node.inputs or not isinstance(node.name, str):
            raise Unsound(f"{node.name} is not derived from the state alone")
    computed = {graph.input}
    for node in graph.nodes:
        _require_types(node.name, node.op)
        if node.name in computed or not isinstance(node.name, str):
            raise Unsound(f"node {node.name} is there twice")
        if not computed.issuperset(node.inputs):
            raise Unsound(f"node {node.name} reads what is not there yet")
        computed.add(node.name)
    if not computed.issuperset(graph.outputs) or computed != set(graph.values) or not graph.outputs:
        raise Unsound("values that no node makes, or outputs that are no values")


def memory_bytes() -> int:
    """Returns the size of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _require_types(name: str, op: Any) -> None:
    for field, hint in typing.get_type_hints(type(op)).items():
        value = getattr(op, field)
        if not fits(value, hint):
            raise Unsound(f"{name} has {field} {value!r}")
        if is_dataclass(value) or hasattr(value, "_fields"):
            _require_types(name, value)


def fits(value: Any, hint: Any) -> bool:
    """Returns whether a value has the annotated type; a bool does not count as an int, and an int
    must be below 2**31 in magnitude."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(fits(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(fits, value, inner))
    if hint is Any:
        return True
    if origin is typing.Literal:
        return type(value) is str and value in inner
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint and (hint is not int or abs(value) < _MOST)


def require_spec(spec: str, leaves: int) -> None:
    """Raises Unsound unless the result is made of lists, tuples and dicts of `leaves` tensors; for
    other containers torch would import whatever type the file names."""
    try:
        _, root = json.loads(spec)
    except (ValueError, TypeError, RecursionError):
        raise Unsound("the result is made up of nothing that is known") from None
    found, waiting = 0, [root]
    while waiting:
        item = waiting.pop()
        kind, below = item.get("type"), item.get("children_spec")
        if kind is None and below == []:
            found += 1
        elif kind in _CONTAINERS and isinstance(below, list):
            waiting += below
        else:
            raise Unsound(f"the result is made up of {kind}")
    if found != leaves:
        raise Unsound(f"the result has {found} tensors, and the graph {leaves} outputs")
