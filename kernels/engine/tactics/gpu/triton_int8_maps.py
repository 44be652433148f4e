"""Computes what lies between the convolutions of a quantised network, conversions, pools and means,
by one Triton kernel each; torch's operations, which know no int8, would take a dozen passes.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import (
    AveragePool,
    Convert,
    Graph,
    MaxPool,
    Mean,
    Node,
    State,
)
from resfuse.kernels.engine.ir.lowered import Call, Values
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics.gpu import triton_kernels
from resfuse.kernels.engine.tactics.quantized_eager import OnDevice, divisors_of, is_quantized
from resfuse.kernels.gpu.common.arguments import empty_channels_last
from resfuse.kernels.ops.quantization import Quantization
from resfuse.kernels.tuning_cache.denylist import Key, key_of

if TYPE_CHECKING:
    from resfuse.kernels.gpu.int8_maps.pool import PoolProblem

refusal = triton_kernels.refusal


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    from resfuse.kernels.gpu.int8_maps import convert, pool

    node = graph.nodes[at]
    if not is_quantized(node, graph.values):
        return
    configs: Iterable[convert.Config | pool.Config] = ()
    if isinstance(node.op, Convert):
        configs = convert.CONFIGS
    elif (problem := _problem(graph, node)) is not None and pool.refusal(problem) is None:
        configs = pool.candidates(problem)
    for config in configs:
        yield Candidate("int8_maps", at, at + 1, tuple(asdict(config).items()))


def configuration(graph: Graph, candidate: Candidate) -> Key:
    from resfuse.kernels.gpu.int8_maps import convert, pool

    if isinstance(graph.nodes[candidate.start].op, Convert):
        return key_of("convert_int8", "int8", convert.Config(**candidate.settings))
    return key_of("pool_int8", "int8", pool.Config(**candidate.settings))


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 0


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
    node = graph.nodes[candidate.start]
    given, made = graph.values[node.inputs[0]], graph.values[node.name]
    if isinstance(node.op, Convert):
        how = made.quantization or given.quantization
        assert how is not None
        return _convert(node, candidate, how, made.dtype)
    return _pool(graph, node, candidate)


def _convert(node: Node, candidate: Candidate, how: Quantization, dtype: torch.dtype) -> Call:
    from resfuse.kernels.gpu.int8_maps import convert

    config = convert.Config(**candidate.settings)

    def run(values: Values) -> None:
        x = convert.dense(values[node.inputs[0]])
        y = torch.empty_like(x, dtype=dtype)
        triton_kernels.run(convert.launch(x, y, how, config))
        values[node.name] = y

    return Call(run)


def _pool(graph: Graph, node: Node, candidate: Candidate) -> Call:
    from resfuse.kernels.gpu.int8_maps import pool

    config, problem = pool.Config(**candidate.settings), _problem(graph, node)
    assert problem is not None
    stored, output = (graph.values[name].quantization for name in (node.inputs[0], node.name))
    shape, dtype = graph.values[node.name].shape, graph.values[node.name].dtype
    divisors = None
    if isinstance(node.op, Mean):
        divisors = OnDevice(torch.full((1, 1), float(problem.h * problem.w), device="cpu"))
    elif isinstance(node.op, AveragePool):
        divisors = OnDevice(divisors_of(node.op, problem.input_shape))

    def run(values: Values) -> None:
        x = triton_kernels.as_map(values[node.inputs[0]], problem.input_shape)
        y = empty_channels_last(problem.output_shape, x.new_empty(0, dtype=dtype))
        by = None if divisors is None else divisors(x.device)
        triton_kernels.run(pool.launch(problem, x, y, config, by, stored, output))
        values[node.name] = y.reshape(shape)

    return Call(run)


def _problem(graph: Graph, node: Node) -> "PoolProblem | None":
    """Returns the windows of a pool or a mean, None for another operation."""
    from resfuse.kernels.gpu.int8_maps.pool import PoolProblem

    op, given = node.op, graph.values[node.inputs[0]].shape
    if not isinstance(op, MaxPool | AveragePool | Mean) or len(given) != 4:
        return None
    n, c, h, w = given
    if isinstance(op, Mean):
        return PoolProblem(n, c, h, w, 1, 1, (h, w), (1, 1), (0, 0))
    p, q = graph.values[node.name].shape[2:]
    dilation = op.dilation if isinstance(op, MaxPool) else (1, 1)
    return PoolProblem(n, c, h, w, p, q, op.kernel, op.stride, op.padding, dilation)
