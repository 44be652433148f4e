"""Computes a network's stem, 7x7/2 convolution, ReLU and 3x3/2 max-pool, by one Triton kernel."""

from collections.abc import Iterable
from dataclasses import asdict

from torch import Tensor

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.folded_weights import conv_weights
from resfuse.kernels.engine.ir.graph import Conv, Graph, MaxPool, State
from resfuse.kernels.engine.ir.lowered import Call, Values
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics.gpu import triton_kernels
from resfuse.kernels.gpu.common.arguments import empty_channels_last
from resfuse.kernels.gpu.stem.stem_config import Config, StemProblem, candidates
from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry
from resfuse.kernels.tuning_cache.denylist import Key, key_of

_POOL = MaxPool((3, 3), (2, 2), (1, 1), (1, 1))

refusal = triton_kernels.refusal


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    if at + 1 >= len(graph.nodes):
        return
    node, pool = graph.nodes[at : at + 2]
    op = node.op
    if not isinstance(op, Conv) or not _is_stem(op.problem) or pool.op != _POOL:
        return
    if pool.inputs != (node.name,) or graph.readers[node.name] != 1:
        return
    major, minor = triton_kernels.capability(graph)
    for config in candidates(_problem(op.problem)):
        if config.least_capability <= 10 * major + minor:
            yield Candidate("stem", at, at + 2, tuple(asdict(config).items()))


def configuration(graph: Graph, candidate: Candidate) -> Key:
    return key_of("stem", triton_kernels.math_mode(graph, candidate), Config(**candidate.settings))


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 0


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
    from resfuse.kernels.gpu.stem.stem_kernel import launch, pack_weight

    node, pool = graph.nodes[candidate.start : candidate.stop]
    op = node.op
    assert isinstance(op, Conv)
    problem = op.problem

    def lay_out() -> list[Tensor]:
        weight, bias = conv_weights(op, state)
        return [pack_weight(weight), bias]

    packed, bias = arena.tensors(("stem", *triton_kernels.key_of(op)), lay_out)
    config = Config(**candidate.settings)
    inputs, shape = problem.input_shape, graph.values[pool.name].shape

    def run(values: Values) -> None:
        x = triton_kernels.as_map(values[node.inputs[0]], inputs)
        y = empty_channels_last(shape, x)
        triton_kernels.run(launch(y, x, packed, bias, math_mode=problem.math_mode, config=config))
        values[pool.name] = y

    return Call(run)


def _is_stem(problem: ConvProblem) -> bool:
    return (
        (problem.r, problem.s) == (7, 7)
        and problem.geometry == Geometry((2, 2), (3, 3))
        and problem.c <= 4
        and problem.activation == "relu"
        and not problem.residual
        and not problem.is_quantized
    )


def _problem(problem: ConvProblem) -> StemProblem:
    return StemProblem(problem.n, problem.c, problem.h, problem.w, problem.k, problem.math_mode)
