"""Converts a graph and its segments to JSON and back: what a saved engine has besides weights."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Convert,
    Graph,
    GroupNorm,
    LayerNorm,
    MaxPool,
    Mean,
    Node,
    Norm,
    Operation,
    Pick,
    SplitSoftmax,
    SplitSum,
    Torch,
    Value,
)
from resfuse.kernels.engine.planning.planner import Segment
from resfuse.kernels.ops.conv_problem import ConvProblem
from resfuse.kernels.ops.quantization import Quantization

_OPERATIONS = {
    kind.__name__: kind
    for kind in (
        Conv,
        Affine,
        MaxPool,
        AveragePool,
        Pick,
        Mean,
        Concat,
        Convert,
        LayerNorm,
        GroupNorm,
        SplitSum,
        SplitSoftmax,
        Torch,
    )
}


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """Returns a graph as objects that json can write."""
    return {
        "input": graph.input,
        "outputs": list(graph.outputs),
        "spec": graph.spec,
        "constants": list(graph.constants),
        "values": {name: _value_to_json(value) for name, value in graph.values.items()},
        "derived": list(map(_node_to_json, graph.derived)),
        "nodes": list(map(_node_to_json, graph.nodes)),
        **({"layout": list(graph.layout)} if graph.layout is not None else {}),
    }


def _node_to_json(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "inputs": list(node.inputs),
        "operation": type(node.op).__name__,
        **_operation_to_json(node.op),
    }


def _value_to_json(value: Value) -> dict[str, Any]:
    plain = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return plain | (asdict(value.quantization) if value.quantization is not None else {})


def _value(data: dict[str, Any]) -> Value:
    quantization = None
    if "scale" in data:
        quantization = Quantization(data["scale"], data["zero_point"])
    return Value(tuple(data["shape"]), _dtype(data["dtype"]), quantization)


def _operation_to_json(op: Operation) -> dict[str, Any]:
    """An operation's fields; of a convolution's residual, that there is one stands in its problem,
    and that it is added last beside it."""
    plain = asdict(op)
    if isinstance(op, Conv):
        plain |= {"problem": op.problem.to_plain(), "residual_last": op.residual_last}
    return plain


def graph_from_json(data: dict[str, Any]) -> Graph:
    """Returns the graph that graph_to_json wrote.

    Raises:
        KeyError, TypeError, ValueError: graph_to_json did not write `data`.
    """
    return Graph(
        data["input"],
        tuple(data["outputs"]),
        tuple(_node(dict(node)) for node in data["nodes"]),
        {name: _value(value) for name, value in data["values"].items()},
        data["spec"],
        tuple(data.get("constants", [])),
        tuple(data["layout"]) if "layout" in data else None,
        tuple(_node(dict(node)) for node in data["derived"]),
    )


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"dtype {name!r}")
    return found


def segments_to_json(segments: tuple[Segment, ...]) -> list[dict[str, Any]]:
    """Returns segments as objects that json can write."""
    return [
        {
            "choice": asdict(segment.candidate),
            "ms": segment.ms,
            "runner_up": asdict(segment.runner_up) if segment.runner_up else None,
            "runner_up_ms": segment.runner_up_ms,
        }
        for segment in segments
    ]


def segments_from_json(data: list[dict[str, Any]]) -> tuple[Segment, ...]:
    """Returns the segments that segments_to_json wrote.

    Raises:
        KeyError, TypeError, ValueError: segments_to_json did not write `data`.
    """
    return tuple(
        Segment(
            _candidate(item["choice"]),
            item["ms"],
            _candidate(item["runner_up"]) if item["runner_up"] else None,
            item["runner_up_ms"],
        )
        for item in data
    )


def _candidate(data: dict[str, Any]) -> Candidate:
    return Candidate(data["tactic"], data["start"], data["stop"], _tuples(data["config"]))


def _tuples(value: Any) -> Any:
    """Turns lists into tuples at every level, since JSON knows lists only."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _node(data: dict[str, Any]) -> Node:
    name, inputs, kind = data.pop("name"), data.pop("inputs"), data.pop("operation")
    return Node(name, _READERS.get(kind, _plain(kind))(data), tuple(inputs))


def _plain(kind: str) -> Callable[[dict[str, Any]], Operation]:
    return lambda data: _OPERATIONS[kind](**{k: _tuple(v) for k, v in data.items()})


def _conv(data: dict[str, Any]) -> Conv:
    problem = ConvProblem.from_plain(data.pop("problem"), last := data.pop("residual_last"))
    if last and not problem.residual:
        raise ValueError("a convolution adds last what it does not add")
    return Conv(problem, **_with_norm(data))


def _affine(data: dict[str, Any]) -> Affine:
    return Affine(**_with_norm(data))


def _torch(data: dict[str, Any]) -> Torch:
    kwargs = tuple((key, value) for key, value in data["kwargs"])
    return Torch(data["target"], tuple(data["args"]), kwargs, data["result"])


def _with_norm(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"norm": Norm(**data["norm"]) if data["norm"] else None}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_READERS: dict[str, Callable[[dict[str, Any]], Operation]] = {
    "Conv": _conv,
    "Affine": _affine,
    "Torch": _torch,
}
