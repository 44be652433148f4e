"""Lowers convolutions to oneDNN's fused ones on the CPU, with weights packed once."""

from collections.abc import Iterable

import torch

from resfuse.kernels.cpu import onednn
from resfuse.kernels.cpu.onednn import PackedConv
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.folded_weights import conv_weights, slope_of
from resfuse.kernels.engine.ir.graph import Conv, Graph, State, Torch
from resfuse.kernels.engine.ir.lowered import Call, Values
from resfuse.kernels.engine.memory.buffers import Arena


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "oneDNN computes on the CPU"
    return None if onednn.supports(dtype) else f"oneDNN has no fused convolution in {dtype} here"


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    op = graph.nodes[at].op
    if isinstance(op, Conv) and not op.residual_last and onednn.supports(op.problem.dtype):
        yield Candidate("onednn", at, at + 1)


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 0


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
    node = graph.nodes[candidate.start]
    op = node.op
    assert isinstance(op, Conv)
    problem = op.problem
    input_shape = torch.Size(problem.input_shape)
    output_shape, whole = graph.values[node.name].shape, problem.output_shape

    def pack() -> PackedConv:
        weight, bias = conv_weights(op, state)
        slope = slope_of(op, state)
        return PackedConv(weight, bias, problem.geometry, problem.activation, slope, input_shape)

    conv = arena.packed(("onednn", op), pack)
    # A residual is overwritten with the sum where no other node and no view needs it afterwards.
    residual = node.residual
    owned = residual is not None and residual not in arena and _is_no_view(graph, residual)
    is_last_read = owned and graph.last_read[str(residual)] == candidate.start
    overwrite = is_last_read and node.inputs.count(str(residual)) == 1  # it is not also x

    def run(values: Values) -> None:
        x = values[node.inputs[0]].reshape(input_shape)
        y = conv(x) if residual is None else conv.add(x, values[residual].reshape(whole), overwrite)
        values[node.name] = y.reshape(output_shape)

    return Call(run)


def _is_no_view(graph: Graph, name: str) -> bool:
    """Returns whether a value shares its memory with no other: torch's operations may return, or
    hold on to, views."""
    related = [n for n in graph.nodes if n.name == name or name in n.inputs]
    return any(n.name == name for n in related) and not any(
        isinstance(n.op, Torch) for n in related
    )
