"""Computes the end of a bottleneck, 3x3 and 1x1 + residual + ReLU, and the next block's first 1x1,
two or three nodes, by one Triton kernel.

A block's projection is a node between the two and part of the segment, computed before by a kernel
of its own. So the planner compares folding it into the 1x1 (triton_projection.py) with saving the
3x3's round trip through memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, Node, State
from resfuse.kernels.engine.ir.lowered import Call, Values
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics.gpu import triton_kernels
from resfuse.kernels.engine.tactics.gpu.triton_conv1x1 import is_gemm
from resfuse.kernels.engine.tactics.gpu.triton_projection import is_projection
from resfuse.kernels.gpu.block_tail.block_tail_config import Config, TailProblem, candidates
from resfuse.kernels.gpu.common.arguments import empty_channels_last
from resfuse.kernels.gpu.inspect.ptxas import SOUND, is_sound, sound_path
from resfuse.kernels.ops.conv_problem import ConvProblem
from resfuse.kernels.tuning_cache.denylist import Key, key_of


@dataclass(frozen=True)
class _Tail:
    """The nodes of a segment and the problem of the fused kernel."""

    conv3x3: Node
    projection: Node | None
    conv1x1: Node
    following: Node | None
    problem: TailProblem

    @property
    def fused(self) -> list[Node]:
        return [n for n in (self.conv3x3, self.conv1x1, self.following) if n is not None]


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why the kernel cannot run on a device in a dtype, None where it can. On Hopper its
    second dot reads registers, which older versions of ptxas may corrupt."""
    refused = triton_kernels.refusal(device, dtype)
    if refused or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return refused
    from triton.backends.nvidia.compiler import get_ptxas

    return refusal_of_ptxas(get_ptxas(90).version)


def refusal_of_ptxas(version: str) -> str | None:
    """Returns why a version of ptxas may not compile the kernel for Hopper, None where it may."""
    if is_sound(version):
        return None
    least = ".".join(map(str, SOUND))
    return (
        f"ptxas {version} may miscompile register operands of WGMMA, and this kernel has them: set "
        f"TRITON_PTXAS_PATH to one from {least} on: {sound_path() or 'nvidia-cuda-nvcc on PyPI'}"
    )


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    for stop in range(at + 2, min(at + 4, len(graph.nodes)) + 1):
        tail = _tail(graph, at, stop)
        if tail is not None:
            for config in candidates(tail.problem)[: _most(tail.problem)]:
                yield Candidate("block_tail", at, stop, tuple(asdict(config).items()))


def _most(problem: TailProblem) -> int | None:
    """Returns the number of tiles to offer, None for all.

    Tails of 128 and 256 channels took 1.2 to 2.5 times as long as cuDNN's convolutions on an H200,
    in every tile tried (results/nvidia-h200/NOTES.md). One is offered for the sake of other GPUs.
    """
    return 1 if problem.c > 64 else None


def configuration(graph: Graph, candidate: Candidate) -> Key:
    mode = triton_kernels.math_mode(graph, candidate)
    return key_of("block_tail", mode, Config(**candidate.settings))


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 0


def kernels(graph: Graph, candidate: Candidate) -> list[Graph]:
    """Returns the parts that each kernel computes: the projection, if there is one, and the
    rest."""
    tail = _tail(graph, candidate.start, candidate.stop)
    assert tail is not None
    if tail.projection is None:
        return [graph.part(candidate.start, candidate.stop)]
    before, behind = graph.nodes[: candidate.start], graph.nodes[candidate.stop :]
    ordered = replace(graph, nodes=(*before, tail.projection, *tail.fused, *behind))
    middle = candidate.start + 1
    return [ordered.part(candidate.start, middle), ordered.part(middle, candidate.stop)]


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
    from resfuse.kernels.gpu.block_tail.block_tail_kernel import launch

    tail = _tail(graph, candidate.start, candidate.stop)
    assert tail is not None
    config, problem = Config(**candidate.settings), tail.problem
    weight_store = [triton_kernels.weights(_conv(node), state, arena) for node in tail.fused]
    (weight2, bias2), (weight3, bias3), *chain = weight_store
    inputs = _conv(tail.conv3x3).problem.input_shape
    outputs = _conv(tail.conv1x1).problem.output_shape
    residual_name = str(tail.conv1x1.residual)
    project = _projecting(tail.projection, state, arena) if tail.projection else None

    def run(values: Values) -> None:
        x = triton_kernels.as_map(values[tail.conv3x3.inputs[0]], inputs)
        if project is None:
            residual = triton_kernels.as_map(values[residual_name], outputs)
        else:
            residual = project(values)
        y = empty_channels_last(outputs, x)
        following: list[Tensor] = []
        if tail.following is not None:
            y_next = empty_channels_last(graph.values[tail.following.name].shape, x)
            following = [*chain[0], y_next]
            values[tail.following.name] = y_next
        made = launch(problem, config, x, weight2, bias2, weight3, bias3, residual, y, *following)
        triton_kernels.run(made)
        values[tail.conv1x1.name] = y

    return Call(run)


def _projecting(node: Node, state: State, arena: Arena) -> Callable[[Values], Tensor]:
    """The projection by conv1x1's kernel, in the configuration that it would choose."""
    from resfuse.kernels.gpu.conv.conv_arguments import Tensors
    from resfuse.kernels.gpu.conv1x1.conv1x1_kernel import launch

    problem = _conv(node).problem
    weight, bias = triton_kernels.weights(_conv(node), state, arena)

    def project(values: Values) -> Tensor:
        x = triton_kernels.as_map(values[node.inputs[0]], problem.input_shape)
        y = empty_channels_last(problem.output_shape, x)
        triton_kernels.run(launch(problem, Tensors(x, weight, bias, None, None, y)))
        return y

    return project


def _tail(graph: Graph, at: int, stop: int) -> _Tail | None:
    """Returns nodes [at, stop) as the end of a bottleneck, None if they are not one."""
    conv3x3, *rest = graph.nodes[at:stop]
    projection = rest.pop(0) if len(rest) > 1 and is_projection(graph, *rest[:2]) else None
    conv1x1, following = rest[0], rest[1] if len(rest) > 1 else None
    if len(rest) > 2 or not isinstance(conv3x3.op, Conv) or not isinstance(conv1x1.op, Conv):
        return None
    first, second = conv3x3.op.problem, conv1x1.op.problem
    fits = (
        _is_conv3x3(first)
        and is_gemm(second)
        and second.stride == (1, 1)
        and second.activation == "relu"
        and second.residual
        and not conv1x1.op.residual_last
        and conv1x1.inputs[0] == conv3x3.name
        and graph.readers[conv3x3.name] == 1
    )
    if not fits or (following is not None and not _follows(conv1x1, following)):
        return None
    d = _conv(following).problem.k if following is not None else 0
    problem = TailProblem(
        first.n, first.c, first.h, first.w, second.k, d, first.stride[0], first.math_mode
    )
    return _Tail(conv3x3, projection, conv1x1, following, problem)


def _is_conv3x3(problem: ConvProblem) -> bool:
    return (
        (problem.r, problem.s, problem.groups) == (3, 3, 1)
        and (problem.padding, problem.dilation) == ((1, 1), (1, 1))
        and problem.stride in ((1, 1), (2, 2))
        and problem.c == problem.k
        and problem.activation == "relu"
        and not problem.residual
        and not problem.is_quantized
    )


def _follows(node: Node, following: Node) -> bool:
    """Returns whether `following` is a 1x1 convolution + ReLU of the result of `node`."""
    op = following.op
    return (
        isinstance(op, Conv)
        and following.inputs == (node.name,)
        and is_gemm(op.problem)
        and op.problem.stride == (1, 1)
        and op.activation == "relu"
    )


def _conv(node: Node) -> Conv:
    assert isinstance(node.op, Conv)
    return node.op
