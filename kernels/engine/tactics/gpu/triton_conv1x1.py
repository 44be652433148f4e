"""Computes a 1x1 convolution with its epilogue as one GEMM by a Triton kernel, with tensor
descriptors (TMA) where the GPU has them.
"""

from collections.abc import Iterable
from dataclasses import asdict

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, State
from resfuse.kernels.engine.ir.lowered import Call
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics.gpu import triton_kernels
from resfuse.kernels.gpu.conv1x1.conv1x1_config import Config, Conv1x1Problem, candidates, gemm_of
from resfuse.kernels.ops.conv_problem import ConvProblem
from resfuse.kernels.tuning_cache.denylist import Key, key_of

refusal = triton_kernels.refusal


def is_gemm(problem: ConvProblem) -> bool:
    """Returns whether a convolution of floats is a matrix product, of every n-th row of x if it has
    a stride."""
    if problem.is_quantized:
        return False
    return (problem.r, problem.s, problem.groups) == (1, 1, 1) and problem.padding == (0, 0)


def configs(problem: Conv1x1Problem, graph: Graph) -> list[Config]:
    """Returns the configurations that the graph's GPU can run; TMA exists since Hopper."""
    by_descriptors = triton_kernels.capability(graph) >= (9, 0)
    return [c for c in candidates(problem) if by_descriptors or not c.descriptors]


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    op = graph.nodes[at].op
    if isinstance(op, Conv) and is_gemm(op.problem):
        for config in configs(gemm_of(op.problem), graph):
            yield Candidate("triton_conv1x1", at, at + 1, tuple(asdict(config).items()))


def configuration(graph: Graph, candidate: Candidate) -> Key:
    mode = triton_kernels.math_mode(graph, candidate)
    return key_of("conv1x1", mode, Config(**candidate.settings))


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 0


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
    from resfuse.kernels.gpu.conv1x1.conv1x1_kernel import launch

    op = graph.nodes[candidate.start].op
    assert isinstance(op, Conv)
    problem, config = op.problem, Config(**candidate.settings)
    return triton_kernels.convolution(
        graph, candidate, state, arena, lambda t: launch(problem, t, config)
    )
