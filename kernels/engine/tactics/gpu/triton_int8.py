"""Computes a convolution or linear layer of quantised values, requantised, with its residual and
activation, by one Triton kernel: as an implicit GEMM, or a 1x1 by tensor descriptors (TMA) where
the GPU has them.

Values are int8, those in uint8 less 128 (ops/quantization.py). Each tile takes a compilation, a
check and a measurement, so of the implicit GEMM's only those with the least estimated time are
offered.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, State
from resfuse.kernels.engine.ir.lowered import Call, Values
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics.gpu import triton_kernels
from resfuse.kernels.engine.tactics.quantized_eager import quantized_weights
from resfuse.kernels.gpu.common.arguments import channels_last, empty_channels_last
from resfuse.kernels.gpu.conv import conv_config
from resfuse.kernels.gpu.conv1x1 import conv1x1_config
from resfuse.kernels.ops.conv_problem import ConvProblem
from resfuse.kernels.ops.quantization import INT32_PRODUCTS, Quantization
from resfuse.kernels.tuning_cache.denylist import Key, key_of

if TYPE_CHECKING:
    from resfuse.kernels.gpu.common.launch import Launch
    from resfuse.kernels.gpu.conv_int8.conv_int8_kernel import Tensors

MOST = 6  # of the implicit GEMM's tiles, as triton_conv.py offers of those in fp16

refusal = triton_kernels.refusal


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    op = graph.nodes[at].op
    if not isinstance(op, Conv) or not op.problem.is_quantized or _may_overflow(op.problem):
        return
    if triton_kernels.capability(graph) >= (9, 0):
        for tile in conv1x1_config.candidates(conv1x1_config.gemm_of(op.problem)):
            yield _candidate(at, "descriptors", tile)
    sms = triton_kernels.multiprocessors(graph)
    every = conv_config.candidates(op.problem)
    for config in sorted(every, key=lambda c: conv_config.cycles(op.problem, c, sms))[:MOST]:
        yield _candidate(at, "implicit_gemm", config)


def configuration(graph: Graph, candidate: Candidate) -> Key:
    """Returns the denylist's key, the same whether a convolution stores int8 or float32."""
    return key_of("conv_int8", "int8", _config(candidate))


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 0


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
    from resfuse.kernels.gpu.conv_int8.conv_int8_kernel import Tensors

    node = graph.nodes[candidate.start]
    op = node.op
    assert isinstance(op, Conv)
    stored, output = (graph.values[name].quantization for name in (node.inputs[0], node.name))
    added = None if node.residual is None else graph.values[node.residual].quantization
    assert stored is not None
    weight, table, scale, bias = _weights(op, stored, state, arena)
    slope = triton_kernels.slope_in(op, state, arena)
    inputs, outputs = op.problem.input_shape, op.problem.output_shape
    shape = graph.values[node.name].shape
    like = scale if output is None else weight

    def run(values: Values) -> None:
        x = triton_kernels.as_map(values[node.inputs[0]], inputs)
        residual = None
        if node.residual is not None:
            residual = triton_kernels.as_map(values[node.residual], outputs)
        y = empty_channels_last(outputs, like)
        tensors = Tensors(x, weight, table, scale, bias, residual, slope, y)
        triton_kernels.run(_launch(candidate, op.problem, tensors, added, output))
        values[node.name] = y.reshape(shape)

    return Call(run)


def _weights(op: Conv, x: Quantization, state: State, arena: Arena) -> list[Tensor]:
    """Returns what a launch reads of a layer: the weight in int8 and channels_last, the offsets of
    its sums, scale and bias; of shapes alone where the state has no numbers."""
    from resfuse.kernels.gpu.conv_int8.conv_int8_kernel import offsets

    problem = op.problem

    def lay_out() -> list[Tensor]:
        if state[op.weight].is_meta:
            weight = torch.empty(problem.weight_shape, dtype=torch.int8, device="meta")
            scale = bias = torch.empty(problem.k, dtype=torch.float32, device="meta")
        else:
            weight, (scale, bias, _) = quantized_weights(op, state, x)
        weight = channels_last(weight)
        return [weight, offsets(weight, x, problem.geometry), scale.contiguous(), bias.contiguous()]

    key = "int8 on a GPU", x, op.correction, problem.geometry, *triton_kernels.key_of(op)
    return arena.tensors(key, lay_out)


def _launch(
    candidate: Candidate,
    problem: ConvProblem,
    tensors: "Tensors",
    residual: Quantization | None,
    output: Quantization | None,
) -> "Launch":
    from resfuse.kernels.gpu.conv_int8 import conv1x1_int8_kernel, conv_int8_kernel

    config = _config(candidate)
    if isinstance(config, conv_config.Config):
        return conv_int8_kernel.launch(problem, tensors, config, residual, output)
    gemm = conv1x1_int8_kernel.gemm(problem, tensors)
    return conv1x1_int8_kernel.launch(gemm, tensors, config, residual, output)


def _may_overflow(problem: ConvProblem) -> bool:
    """Returns whether a sum may not fit an int32; torch computes such a layer, in fp64."""
    return problem.r * problem.s * problem.c // problem.groups > INT32_PRODUCTS


def _config(candidate: Candidate) -> conv_config.Config | conv1x1_config.Config:
    settings = candidate.settings
    by_descriptors = settings.pop("form") == "descriptors"
    kind = conv1x1_config.Config if by_descriptors else conv_config.Config
    return kind(**settings)


def _candidate(at: int, form: str, config: conv_config.Config | conv1x1_config.Config) -> Candidate:
    return Candidate("int8", at, at + 1, (("form", form), *asdict(config).items()))
