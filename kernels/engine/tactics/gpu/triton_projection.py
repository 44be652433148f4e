"""Computes the end of a block that changes resolution with its projection shortcut folded into the
reduction, y = act([h, x strided] @ [W3; Wd] + bias): two nodes by one Triton kernel.
"""

from collections.abc import Iterable
from dataclasses import asdict, replace

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.folded_weights import conv_weights
from resfuse.kernels.engine.ir.graph import Conv, Graph, Node, State
from resfuse.kernels.engine.ir.lowered import Call, Values
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics.gpu import triton_conv1x1, triton_kernels
from resfuse.kernels.gpu.common.arguments import channels_last, empty_channels_last
from resfuse.kernels.gpu.conv1x1.conv1x1_config import Config, gemm_of
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue

refusal = triton_kernels.refusal


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    found = _pair(graph, at)
    if found is None:
        return
    shortcut, main = found
    problem = gemm_of(_alone(main), shortcut.problem.c, shortcut.problem.stride)
    for config in triton_conv1x1.configs(problem, graph):
        yield Candidate("projection", at, at + 2, tuple(asdict(config).items()))


configuration = triton_conv1x1.configuration


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 0


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
    from resfuse.kernels.gpu.conv.conv_arguments import Tensors
    from resfuse.kernels.gpu.conv1x1.conv1x1_kernel import Shortcut, launch

    side, node = graph.nodes[candidate.start : candidate.stop]
    shortcut, main = side.op, node.op
    assert isinstance(shortcut, Conv) and isinstance(main, Conv)

    def lay_out() -> list[Tensor]:
        (weight, bias), (side_weight, side_bias) = (
            conv_weights(op, state, torch.float64) for op in (main, shortcut)
        )
        dtype = main.problem.dtype
        both = [channels_last(w.to(dtype)) for w in (weight, side_weight)]
        return [*both, (bias + side_bias).to(dtype)]  # rounded once

    key = ("projection", *map(triton_kernels.key_of, (main, shortcut)))
    weight, side_weight, bias = arena.tensors(key, lay_out)
    slope = triton_kernels.slope_in(main, state, arena)
    problem, config = _alone(main), Config(**candidate.settings)
    inputs, outputs = problem.input_shape, problem.output_shape
    side_inputs = shortcut.problem.input_shape
    shape = graph.values[node.name].shape

    def run(values: Values) -> None:
        x = triton_kernels.as_map(values[node.inputs[0]], inputs)
        side_x = triton_kernels.as_map(values[side.inputs[0]], side_inputs)
        y = empty_channels_last(outputs, x)
        tensors = Tensors(x, weight, bias, None, slope, y)
        folded = Shortcut(side_x, side_weight, shortcut.problem.stride)
        triton_kernels.run(launch(problem, tensors, config, folded))
        values[node.name] = y.reshape(shape)

    return Call(run)


def _alone(main: Conv) -> ConvProblem:
    """The 1x1 convolution without what it adds, which the kernel computes itself."""
    return replace(main.problem, epilogue=Epilogue(main.activation))


def is_projection(graph: Graph, side: Node, node: Node) -> bool:
    """Returns whether `node` is the only reader of the 1x1 convolution `side` and adds it."""
    op = side.op
    return (
        isinstance(op, Conv)
        and triton_conv1x1.is_gemm(op.problem)
        and op.activation == "identity"
        and not op.problem.residual
        and node.residual == side.name
        and graph.readers[side.name] == 1
    )


def _pair(graph: Graph, at: int) -> tuple[Conv, Conv] | None:
    """Returns the projection at position `at` and the 1x1 convolution after it that adds it, None
    if they are not there."""
    if at + 1 >= len(graph.nodes):
        return None
    side, node = graph.nodes[at : at + 2]
    shortcut, main = side.op, node.op
    if not isinstance(shortcut, Conv) or not isinstance(main, Conv) or main.residual_last:
        return None
    fits = is_projection(graph, side, node) and triton_conv1x1.is_gemm(main.problem)
    return (shortcut, main) if fits else None
