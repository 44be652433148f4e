"""What the tactics on our Triton kernels share: where they run, how they find weights and inputs
laid out, and how they launch. Kernels are imported when they are lowered: Triton may be missing.
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

_DESCRIPTOR_BYTES = 16  # tensors that come by descriptors start at multiples of it
_written: "ContextVar[list[Launch] | None]" = ContextVar("written", default=None)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Of every tactic on a Triton kernel. The CPU has Triton's interpreter, for tests."""
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
    """Of the GPU that is planned for: the graph's, whichever is the current one."""
    from resfuse.kernels.gpu.common import launch

    return launch.capability(graph.device or torch.device("meta"))


def multiprocessors(graph: Graph) -> int:
    """Likewise."""
    from resfuse.kernels.gpu.common import launch

    return launch.multiprocessors(graph.device or torch.device("meta"))


def weights(op: Conv, state: State, arena: Arena) -> tuple[Tensor, Tensor]:
    """Weight in channels_last, and bias; laid out once for all that read them so."""

    def lay_out() -> list[Tensor]:
        weight, bias = conv_weights(op, state)
        return [channels_last(weight), bias]

    weight, bias = arena.tensors(("channels_last", *key_of(op)), lay_out)
    return weight, bias


def slope_in(op: Conv, state: State, arena: Arena) -> Slope:
    """The slope of an activation that has one, laid out once."""
    slope = slope_of(op, state)
    if not isinstance(slope, Tensor):
        return slope
    (weight_store,) = arena.tensors(("slope", op.slope), lambda: [slope.contiguous()])
    return weight_store


def key_of(op: Conv) -> tuple[Hashable, ...]:
    """What folded weights depend on: one may be shared, under other norms and on other shapes."""
    problem = op.problem
    return op.weight, op.bias, op.norm, problem.c, problem.r, problem.s, problem.groups


def math_mode(graph: Graph, candidate: Candidate) -> str:
    """Of the convolutions of a segment."""
    op = graph.nodes[candidate.start].op
    assert isinstance(op, Conv)
    return op.problem.math_mode


def as_map(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` as kernels read it, a copy only where it lies otherwise."""
    image = channels_last(x.reshape(shape))
    if image.data_ptr() % _DESCRIPTOR_BYTES:
        return image.clone(memory_format=torch.channels_last)
    return image


def blank(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[N*C*H*W] as an image [N, C, H, W] in channels_last."""
    n, c, h, w = shape
    return memory.view(n, h, w, c).permute(0, 3, 1, 2)


@contextlib.contextmanager
def written_down() -> "Iterator[list[Launch]]":
    """Within it this thread's launches are put into a list and not run."""
    found: list[Launch] = []
    token = _written.set(found)
    try:
        yield found
    finally:
        _written.reset(token)


def run(launch: "Launch") -> None:
    """Raises RuntimeError where Triton cannot compile the launch, or the GPU has no room for it."""
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
    """One convolution with its epilogue, by the launch that fills y for its tensors."""
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
