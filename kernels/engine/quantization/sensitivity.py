"""Sensitivity: how much quantisation harms each layer by itself, and which layers are to stay in
float32 for a network's error to be small enough.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from resfuse.kernels.engine.ir.graph import Conv, Graph, Node, State
from resfuse.kernels.engine.quantization.quantized_graph import quantized
from resfuse.kernels.engine.quantization.ranges import Ranges
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.ops.quantization import dequantize, quantize


@dataclass(frozen=True)
class LayerError:
    """What quantisation does to the output of one layer that reads exact values.

    Attributes:
        sqnr_db: the ratio of the signal to the noise of quantisation, in dB.
        clipped: the share of its numbers that the range leaves out.
    """

    sqnr_db: float
    clipped: float


def layer_errors(
    graph: Graph, state: State, ranges: Ranges, images: Tensor
) -> dict[str, LayerError]:
    """Returns the error of each convolution and linear layer by itself, by its weight's name: the
    worst where several share one weight."""
    narrow, corrections = quantized(graph, state, ranges, ())
    nodes = {node.name: node for node in narrow.nodes}
    errors: dict[str, LayerError] = {}

    def judge(node: Node, inputs: Mapping[str, Tensor], y: Tensor) -> None:
        found = nodes[node.name]
        if not isinstance(node.op, Conv) or found.op == node.op:
            return
        read = [
            quantize(inputs[name], quantization)
            for name, given in zip(node.inputs, found.inputs, strict=True)
            if (quantization := narrow.values[given].quantization) is not None
        ]
        function = eager.function_of(found, narrow.values, {**state, **corrections})
        answer, stored = function(*read), narrow.values[node.name].quantization
        if stored is not None:
            answer = dequantize(answer, stored)
        one = LayerError(sqnr_db(answer, y), ranges.values[node.name].clipped)
        before = errors.get(node.op.weight, one)
        errors[node.op.weight] = min(before, one, key=lambda error: error.sqnr_db)

    _run(graph, state, images, judge)
    return errors


def least_kept(
    graph: Graph,
    state: State,
    ranges: Ranges,
    images: Tensor,
    errors: Mapping[str, LayerError],
    asked: Collection[str],
    max_error: float,
) -> set[str]:
    """Returns the weights of as few layers as possible, those that quantisation harms most first,
    with which in float32 the network's error is at most `max_error`.

    Args:
        errors: of each layer by itself (layer_errors).
        asked: weights that are kept in any case.
    """
    exact = _run(graph, state, images)
    order = sorted(errors, key=lambda weight: errors[weight].sqnr_db)

    def fits(count: int) -> bool:
        narrow, corrections = quantized(graph, state, ranges, {*asked, *order[:count]})
        answers = _run(narrow, {**state, **corrections}, images)
        return relative_error(answers, exact) <= max_error

    least, most = 0, len(order)  # all of them in float32 have no error
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(middle) else (middle + 1, most)
    return {*asked, *order[:least]}


def relative_error(answers: list[Tensor], exact: list[Tensor]) -> float:
    """Returns the largest relative error of an output, in norm."""
    return max(
        float((y - want).norm() / want.norm().clamp_min(1e-30))
        for y, want in zip(answers, exact, strict=True)
    )


def sqnr_db(answer: Tensor, exact: Tensor) -> float:
    """Returns the ratio of signal to noise, in dB; infinite where there is no noise."""
    noise = (answer.double() - exact.double()).square().sum().item()
    signal = exact.double().square().sum().item()
    return 10 * math.log10(signal / noise) if noise and signal else math.inf


Observe = Callable[[Node, Mapping[str, Tensor], Tensor], None]


def _run(
    graph: Graph, state: State, images: Tensor, observe: Observe | None = None
) -> list[Tensor]:
    """Returns a graph's outputs in torch's own operations.

    Args:
        observe: is shown each node, what it reads by name, and its result.
    """
    values = {graph.input: images}
    for at, node in enumerate(graph.nodes):
        inputs = {name: values[name] for name in node.inputs}
        values[node.name] = eager.function_of(node, graph.values, state)(
            *(inputs[name] for name in node.inputs)
        )
        if observe is not None:
            observe(node, inputs, values[node.name])
        for name in node.inputs:
            if graph.last_read[name] == at:
                values.pop(name, None)
    return [values[name] for name in graph.outputs]
