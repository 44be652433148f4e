"""cuDNN's convolutions with bias, sum and ReLU in their epilogue, as torch offers them; and its
plain convolution, with the bias in a pass of its own, where no ReLU follows.

Each is offered twice: by the algorithm that cuDNN's heuristics choose, and by the one that wins
torch's benchmark of them, which is run again in every process.

Without a residual zeros are added, times zero. torch.cudnn_convolution_relu would pass its own
output for that, before it has been written, and zero times NaN is NaN: networks built of it
answered NaN on an H200 with torch 2.11.
"""

import contextlib
from collections.abc import Iterable, Iterator
from math import prod

import torch
import torch.nn.functional as F

from resfuse.kernels.engine.choice import Choice
from resfuse.kernels.engine.graph import Conv, Graph, State
from resfuse.kernels.engine.room import Room
from resfuse.kernels.engine.tactics import triton_kernels as layout
from resfuse.kernels.engine.work import Call, Values

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"cuDNN computes on NVIDIA GPUs, not on a {device.type}"
    if torch.version.hip is not None or not torch.backends.cudnn.is_available():
        return "this torch is built without cuDNN"
    return None if dtype in _DTYPES else f"cuDNN's fused convolutions do not compute in {dtype}"


def segments(graph: Graph, at: int) -> Iterable[Choice]:
    op = graph.nodes[at].op
    if isinstance(op, Conv) and not op.residual_last:
        plain = op.activation == "identity" and not op.problem.residual
        if op.activation == "relu" or plain:
            for benchmark in (False, True):
                yield Choice("cudnn", at, at + 1, (("benchmark", benchmark),))


def scratch(graph: Graph, choice: Choice) -> int:
    return 0


def lower(graph: Graph, choice: Choice, state: State, room: Room) -> Call:
    node = graph.nodes[choice.start]
    op = node.op
    assert isinstance(op, Conv)
    problem = op.problem
    weight, bias = layout.weights(op, state, room)
    geometry = problem.stride, problem.padding, problem.dilation, problem.groups
    inputs, outputs = layout.input_shape(problem), layout.output_shape(problem)
    shape = graph.values[node.name].shape
    benchmark = bool(choice.settings["benchmark"])
    zeros = None
    if op.activation == "relu" and node.residual is None:
        zeros = layout.blank(room.zeros(prod(outputs), problem.dtype, weight.device), outputs)

    def run(values: Values) -> None:
        with _benchmark(benchmark):
            compute(values)

    def compute(values: Values) -> None:
        x = layout.as_map(values[node.inputs[0]], inputs)
        if node.residual is not None:
            residual = layout.as_map(values[node.residual], outputs)
            y = torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
        elif zeros is not None:
            y = torch.cudnn_convolution_add_relu(x, weight, zeros, 0.0, bias, *geometry)
        else:
            y = F.conv2d(x, weight, bias, *geometry)
        values[node.name] = y.reshape(shape)

    return Call(run)


@contextlib.contextmanager
def _benchmark(wanted: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
