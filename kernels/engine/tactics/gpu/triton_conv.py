"""Computes a convolution with its epilogue as an implicit GEMM, or depthwise, by one Triton kernel.

triton_conv1x1.py has the 1x1 convolutions that are a GEMM already. Each tile takes a compilation, a
check and a measurement, so only those with the least estimated time are offered.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, State
from resfuse.kernels.engine.ir.lowered import Call
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics.gpu import triton_conv1x1, triton_kernels
from resfuse.kernels.gpu.conv.conv_config import Config, candidates, cycles
from resfuse.kernels.ops.conv_problem import ConvProblem
from resfuse.kernels.tuning_cache.denylist import Key, key_of

if TYPE_CHECKING:
    from resfuse.kernels.gpu.conv import depthwise

# On an H200 the estimate picked the fastest of 16 tiles for six of ResNet-50's 3x3 convolutions at
# batch 256, and for the seventh one that was 5 % slower; the fastest is among these for all seven.
MOST = 6
# The fewest input channels in a step of the sum, since a dot takes at least 16. With the three
# channels of a stem, steps of 32 and 64 are nearly empty: no such tile is pipelined, and some spill
# 624 bytes a thread.
LEAST_CHANNELS = 16

refusal = triton_kernels.refusal


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    op = graph.nodes[at].op
    if not isinstance(op, Conv) or triton_conv1x1.is_gemm(op.problem):
        return
    if op.problem.is_quantized:
        return
    if op.problem.c == op.problem.groups:
        from resfuse.kernels.gpu.conv import depthwise

        for narrow in depthwise.candidates(op.problem):
            yield _candidate(at, "depthwise", narrow)
        return
    for config in _tiles(op.problem, triton_kernels.multiprocessors(graph)):
        yield _candidate(at, "implicit_gemm", config)


def _tiles(problem: ConvProblem, sms: int) -> list[Config]:
    """Returns the tiles that fill a step of their sum, the fastest by estimate first."""
    filled = [
        config
        for config in candidates(problem)
        if config.pack(problem) * problem.c // problem.groups >= LEAST_CHANNELS
    ]
    return sorted(filled, key=lambda config: cycles(problem, config, sms))[:MOST]


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 0


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
    from resfuse.kernels.gpu.conv import conv, depthwise

    op = graph.nodes[candidate.start].op
    assert isinstance(op, Conv)
    problem, config = op.problem, _config(candidate)
    if isinstance(config, Config):
        return triton_kernels.convolution(
            graph, candidate, state, arena, lambda t: conv.launch(problem, t, config)
        )
    return triton_kernels.convolution(
        graph, candidate, state, arena, lambda t: depthwise.launch(problem, t, config)
    )


def configuration(graph: Graph, candidate: Candidate) -> Key:
    return key_of("conv_bn_act", triton_kernels.math_mode(graph, candidate), _config(candidate))


def _config(candidate: Candidate) -> "Config | depthwise.Config":
    from resfuse.kernels.gpu.conv import depthwise

    settings = candidate.settings
    form = settings.pop("form")
    return depthwise.Config(**settings) if form == "depthwise" else Config(**settings)


def _candidate(at: int, form: str, config: "Config | depthwise.Config") -> Candidate:
    settings = asdict(config)
    return Candidate("triton_conv", at, at + 1, (("form", form), *settings.items()))
