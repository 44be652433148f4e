"""Given scales: a pass for models that bring their own, as a quantised ONNX file and a program of
torch's PT2E do.

Such a model rounds values to integers in floating point: scale * clamp(round(x / scale)), captured
as four operations of torch's; PT2E multiplies by 1 / scale instead, as our kernels do. A
convolution whose weights are rounded as well, and what lies between convolutions, compute on the
integers themselves, by the same scales, where they read such values alone. What reads others, and
what torch computes, stays in float32. Nothing is rounded that the model does not round.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from resfuse.kernels.engine.frontend.conversions import Rewriter, moves
from resfuse.kernels.engine.ir.folded_weights import conv_weights
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Convert,
    Graph,
    MaxPool,
    Mean,
    Node,
    Operation,
    Pick,
    State,
    Torch,
    Value,
)
from resfuse.kernels.ops.conv_problem import dtypes_of
from resfuse.kernels.ops.quantization import LARGEST, Quantization, quantize_weights

_DIVIDE, _MULTIPLY = "aten.div.Tensor", "aten.mul.Tensor"
_ROUNDING = "aten.round.default", "aten.clamp.default", _MULTIPLY
_LENGTH = 1 + len(_ROUNDING)
_INPUT = {"value": 0}


def with_given_scales(graph: Graph, state: State) -> Graph:
    """Returns a graph that computes on integers where the model rounds to such, the graph itself
    where the model rounds nothing."""
    roundings = _roundings(graph)
    if not roundings:
        return graph
    inner = {name for rounding in roundings.values() for name in rounding.inner}
    nodes = [
        Node(node.name, Convert("uint8"), (roundings[node.name].x,))
        if node.name in roundings
        else node
        for node in graph.nodes
        if node.name not in inner
    ]
    return _Rewriting(replace(graph, nodes=tuple(nodes)), state, roundings).result()


@dataclass(frozen=True)
class _Rounding:
    """A value is rounded to what integers can store.

    Attributes:
        x: the value.
        stored: how its integers are stored; those in -128..127 as uint8, 128 larger.
        inner: the values between x and the result.
    """

    x: str
    stored: Quantization
    inner: tuple[str, ...]


def _roundings(graph: Graph) -> dict[str, _Rounding]:
    """Returns the roundings by the name of their result."""
    producers = {node.name: node for node in graph.nodes}
    found = {}
    for node in graph.nodes:
        if graph.values[node.name].dtype == torch.float32:
            rounding = _rounding(graph, node, producers)
            if rounding is not None:
                found[node.name] = rounding
    return found


def _rounding(graph: Graph, last: Node, producers: Mapping[str, Node]) -> _Rounding | None:
    chain = [last]
    while len(chain) < _LENGTH and chain[0].inputs[:1] and chain[0].inputs[0] in producers:
        chain.insert(0, producers[chain[0].inputs[0]])
        if graph.readers[chain[0].name] != 1:
            return None
    first, *others = map(_target, chain)
    if first not in (_DIVIDE, _MULTIPLY) or tuple(others) != _ROUNDING:
        return None
    args = [node.op.args for node in chain if isinstance(node.op, Torch)]
    given, _, limits, scaled = args
    if any(each[0] != _INPUT for each in args) or len(limits) != 3:
        return None
    numbers = given[1], *limits[1:], scaled[1]
    if not all(isinstance(number, float) for number in numbers):
        return None
    by, least, most, scale = numbers
    if not scale or by != (scale if first == _DIVIDE else 1.0 / scale):
        return None
    if most - least != LARGEST or least != int(least) or not -LARGEST <= least <= 0:
        return None
    try:
        stored = Quantization(scale, -int(least))
    except ValueError:  # beyond what integers are computed with; floats can be rounded so
        return None
    return _Rounding(chain[0].inputs[0], stored, tuple(node.name for node in chain[:-1]))


def _target(node: Node) -> str:
    """Returns the name of an operation of torch's that reads one value and fixed numbers."""
    plain = isinstance(node.op, Torch) and not node.op.kwargs and len(node.inputs) == 1
    return node.op.target if plain and isinstance(node.op, Torch) else ""


def _has_whole_weights(op: Conv, state: State) -> bool:
    """Returns whether the weights of each channel are multiples of a scale: integers are exact."""
    weight, _ = conv_weights(op, state, torch.float64)
    narrow, scale = quantize_weights(weight)
    error = (weight.flatten(1) / scale[:, None] - narrow.flatten(1)).abs()
    return bool((error < 1e-3).all())


@dataclass
class _Rewriting:
    """Takes the nodes in order, roundings being `Convert`s among them."""

    graph: Graph
    state: State
    roundings: Mapping[str, _Rounding]
    rewriter: Rewriter = field(init=False)
    # a rounding's result, where what it reads is stored in integers just so
    aliases: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rewriter = Rewriter(self.graph)

    def result(self) -> Graph:
        for node in self.graph.nodes:
            given = replace(node, inputs=tuple(map(self._name, node.inputs)))
            if node.name in self.roundings:
                self._round(given, self.roundings[node.name].stored)
            else:
                self._compute(given)
        outputs = tuple(map(self._name, self.graph.outputs))
        self.rewriter.graph = replace(self.graph, outputs=outputs)
        return self.rewriter.finished()

    def _name(self, name: str) -> str:
        return self.aliases.get(name, name)

    def _stored(self, name: str) -> Quantization | None:
        return self.rewriter.values[name].quantization

    def _round(self, node: Node, to: Quantization) -> None:
        (x,) = node.inputs
        if self._stored(x) == to:
            self.aliases[node.name] = x
        else:
            value = self.graph.values[node.name]
            self._add(node, node.op, False, Value(value.shape, torch.uint8, to))

    def _compute(self, node: Node) -> None:
        op, value = node.op, self.graph.values[node.name]
        read = [self._stored(name) for name in node.inputs]
        narrow, output = False, None
        rounded = bool(read) and None not in read and value.dtype == torch.float32
        if rounded and (not isinstance(op, Conv) or _has_whole_weights(op, self.state)):
            if isinstance(op, Conv | Affine | Mean | AveragePool):
                output = self._rounded_by_all(node.name)
                narrow = output is not None or not isinstance(op, AveragePool)
            elif isinstance(op, MaxPool | Pick | Concat) or moves(node):
                output = read[0]  # of values that are moved, all are as they were
                narrow = len(set(read)) == 1
        if not narrow:
            self._add(node, op, False, value)
            return
        if isinstance(op, Conv):
            dtypes = dtypes_of("int8_fp32" if output is None else "int8")
            op = replace(op, problem=replace(op.problem, dtypes=dtypes))
        stored = value if output is None else Value(value.shape, torch.uint8, output)
        self._add(node, op, True, stored)

    def _rounded_by_all(self, name: str) -> Quantization | None:
        """Returns how a value is stored that is read as one and the same rounding only."""
        if name in self.graph.outputs:
            return None
        readers = [node.name for node in self.graph.nodes if name in node.inputs]
        ways = {self.roundings[r].stored if r in self.roundings else None for r in readers}
        return ways.pop() if len(ways) == 1 else None

    def _add(self, node: Node, op: Operation, narrow: bool, value: Value) -> None:
        """Adds a node that reads integers, or the real numbers that they stand for."""
        inputs = {name: self.rewriter.values[name] for name in node.inputs}
        if not narrow:
            inputs = {
                name: v if v.quantization is None else Value(v.shape, torch.float32)
                for name, v in inputs.items()
            }
        self.rewriter.add(node, op, inputs, value)
