"""The common part of the tactics on Triton kernels: where they run, layouts of weights and inputs,
and launches. Kernels are imported when they are lowered, since Triton may not be installed.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.folded_weights import conv_weights, slope_of
from resfuse.kernels.engine.ir.graph import Conv, Graph, State
from resfuse.kernels.engine.ir.lowered import Call, Values
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.gpu.common.arguments import channels_last, empty_channels_last
from resfuse.kernels.ops.activation import Slope
from resfuse.kernels.ops.conv_problem import MATH_MODES

if TYPE_CHECKING:
    from resfuse.kernels.gpu.common.launch import Launch
    from resfuse.kernels.gpu.conv.conv_arguments import Tensors

_DESCRIPTOR_BYTES = 16  # the alignment of tensors that are read by descriptors
_written: "ContextVar[list[Launch] | None]" = ContextVar("written", default=None)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why no Triton kernel can run on a device in a dtype, None where they can. On the CPU
    they run in Triton's interpreter, for tests."""
    if dtype not in {stored for stored, _ in MATH_MODES.values()}:
        return f"Triton kernels compute in float32, float16 and bfloat16, not in {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return None
        return f"Triton kernels need compute capability 8.0 or newer, not {major}.{minor}"
    from resfuse.kernels.gpu.common.launch import interpreting

    if device.type == "cpu" and interpreting():
        return None
    return f"Triton kernels run on a GPU, not on a {device.type}"


def capability(graph: Graph) -> tuple[int, int]:
    """Returns the compute capability of the graph's GPU, which need not be the current one."""
    from resfuse.kernels.gpu.common import launch

    return launch.capability(graph.device or torch.device("meta"))


def multiprocessors(graph: Graph) -> int:
    """Returns the number of multiprocessors of the graph's GPU."""
    from resfuse.kernels.gpu.common import launch

    return launch.multiprocessors(graph.device or torch.device("meta"))


def weights(op: Conv, state: State, arena: Arena) -> tuple[Tensor, Tensor]:
    """Returns the folded weight in channels_last and the bias, shared by all tactics that read them
    so."""

    def lay_out() -> list[Tensor]:
        weight, bias = conv_weights(op, state)
        return [channels_last(weight), bias]

    weight, bias = arena.tensors(("channels_last", *key_of(op)), lay_out)
    return weight, bias


def slope_in(op: Conv, state: State, arena: Arena) -> Slope:
    """Returns the slope of an operation's activation, shared if it is a tensor; None without
    one."""
    slope = slope_of(op, state)
    if not isinstance(slope, Tensor):
        return slope
    by_channel = slope.reshape(-1).expand(op.problem.k)  # a file's may be one value for all
    (weight_store,) = arena.tensors(("slope", op.slope), lambda: [by_channel.contiguous()])
    return weight_store


def key_of(op: Conv) -> tuple[Hashable, ...]:
    """Returns what an operation's folded weights depend on: the same weight may be read under other
    norms and on other shapes."""
    problem = op.problem
    return op.weight, op.bias, op.norm, problem.c, problem.r, problem.s, problem.groups


def math_mode(graph: Graph, candidate: Candidate) -> str:
    """Returns the math mode of a segment's convolutions."""
    op = graph.nodes[candidate.start].op
    assert isinstance(op, Conv)
    return op.problem.math_mode


def as_map(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns `x` as an aligned map in channels_last, copied only if it is not one."""
    image = channels_last(x.reshape(shape))
    if image.data_ptr() % _DESCRIPTOR_BYTES:
        return image.clone(memory_format=torch.channels_last)
    return image


def blank(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns memory [N * C * H * W] viewed as [N, C, H, W] in channels_last."""
    n, c, h, w = shape
    return memory.view(n, h, w, c).permute(0, 3, 1, 2)


@contextlib.contextmanager
def written_down() -> "Iterator[list[Launch]]":
    """Collects this thread's launches in a list instead of running them."""
    found: list[Launch] = []
    token = _written.set(found)
    try:
        yield found
    finally:
        _written.reset(token)


def run(launch: "Launch") -> None:
    """Runs a launch, or records it inside `written_down`.

    Raises:
        RuntimeError: Triton cannot compile it, or it exceeds the GPU's resources.
    """
    from triton.errors import TritonError

    if (written := _written.get()) is not None:
        written.append(launch)
        return
    try:
        launch.run()
    except TritonError as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def convolution(
    graph: Graph,
    candidate: Candidate,
    state: State,
    arena: Arena,
    launch_of: "Callable[[Tensors], Launch]",
) -> Call:
    """Lowers a convolution with its epilogue.

    Args:
        launch_of: returns the launch that computes y from given tensors.
    """
    from resfuse.kernels.gpu.conv.conv_arguments import Tensors

    node = graph.nodes[candidate.start]
    op = node.op
    assert isinstance(op, Conv)
    inputs, outputs = op.problem.input_shape, op.problem.output_shape
    shape = graph.values[node.name].shape
    weight, bias = weights(op, state, arena)
    slope = slope_in(op, state, arena)

    def compute(values: Values) -> None:
        x = as_map(values[node.inputs[0]], inputs)
        residual = as_map(values[node.residual], outputs) if node.residual else None
        y = empty_channels_last(outputs, x)
        run(launch_of(Tensors(x, weight, bias, residual, slope, y)))
        values[node.name] = y.reshape(shape)

    return Call(compute)
