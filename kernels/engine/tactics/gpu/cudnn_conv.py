"""Lowers convolutions to cuDNN's with bias, sum and ReLU in the epilogue, as torch offers them; and
to its plain convolution, with the bias in a pass of its own, where no ReLU follows.

There is one candidate for a convolution: the form of cuDNN's ReLU that cudnn_probe.py found correct
and fastest, with plans from heuristics or from torch's search, whichever it found faster. A second
candidate with the search would run the plan of the first, since torch caches plans under a key
without that switch. A search is repeated in every process that runs the engine, at its first call
or before its CUDA graph is recorded; it is only used where it takes at most 0.25 s for each
distinct convolution.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, State
from resfuse.kernels.engine.ir.lowered import Call, Values
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics.gpu import triton_kernels as layout
from resfuse.kernels.gpu.cudnn.cudnn_probe import decided
from resfuse.kernels.gpu.cudnn.cudnn_relu import conv_relu, searching, zeros_for

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"cuDNN computes on NVIDIA GPUs, not on a {device.type}"
    if torch.version.hip is not None or not torch.backends.cudnn.is_available():
        return "this torch is built without cuDNN"
    return None if dtype in _DTYPES else f"cuDNN's fused convolutions do not compute in {dtype}"


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    op = graph.nodes[at].op
    if not isinstance(op, Conv) or op.problem.is_quantized or op.residual_last:
        return
    relu, residual = op.activation == "relu", op.problem.residual
    if relu or (op.activation == "identity" and not residual):
        way = decided(op.problem.math_mode)
        form = (("form", way.form),) if relu and not residual else ()
        yield Candidate("cudnn", at, at + 1, (*form, ("search", way.search)))


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 0


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
    node = graph.nodes[candidate.start]
    op = node.op
    assert isinstance(op, Conv)
    problem = op.problem
    weight, bias = layout.weights(op, state, arena)
    geometry = problem.geometry
    inputs, outputs = problem.input_shape, problem.output_shape
    shape = graph.values[node.name].shape
    form, search = candidate.settings.get("form"), bool(candidate.settings["search"])
    z = None
    if form is not None:
        z = zeros_for(form, outputs, lambda n: arena.zeros(n, problem.dtype, weight.device))

    def run(values: Values) -> None:
        with searching(search):
            compute(values)

    def compute(values: Values) -> None:
        x = layout.as_map(values[node.inputs[0]], inputs)
        if form is not None:
            y = conv_relu(form, x, weight, bias, z, geometry)
        elif node.residual is not None:
            residual = layout.as_map(values[node.residual], outputs)
            y = torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
        else:
            y = F.conv2d(x, weight, bias, *geometry)
        values[node.name] = y.reshape(shape)

    return Call(run)
