"""Computes nodes by torch's own operations on folded weights: the reference for every tactic, and
the fallback where no other tactic applies.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.folded_weights import conv_weights, scale_and_shift
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Convert,
    Finished,
    Graph,
    GroupNorm,
    LayerNorm,
    MaxPool,
    Mean,
    Node,
    Pick,
    SplitSoftmax,
    SplitSum,
    State,
    Torch,
    Value,
)
from resfuse.kernels.engine.ir.graph_state import state_read_by
from resfuse.kernels.engine.ir.lowered import Call, Values
from resfuse.kernels.engine.ir.torch_call import torch_call
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics import quantized_eager
from resfuse.kernels.ops.activation import ACTIVATIONS

Function = Callable[..., Tensor]
Keep = Callable[[Hashable, Callable[[], list[Tensor]]], list[Tensor]]  # as Arena.tensors


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    node = graph.nodes[at]
    # the twin of a native convolution is in fp64: to time it would take most of a build
    op = node.op
    native = isinstance(op, Conv) and quantized_eager.has_native_twin(
        op, graph.values[node.inputs[0]]
    )
    if not native:
        yield Candidate("eager", at, at + 1)


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 0


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
    functions = [
        (node, function_of(node, graph.values, state, arena=arena))
        for node in graph.nodes[candidate.start : candidate.stop]
    ]

    def run(values: Values) -> None:
        for node, function in functions:
            values[node.name] = function(*[values[name] for name in node.inputs])

    return Call(run)


@torch.inference_mode()
def exact(graph: Graph, state: State, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns a graph's outputs computed in fp64 from inputs in the order of its `reads`."""
    values = dict(zip(graph.reads, (_widened(x) for x in inputs), strict=True))
    for node in graph.nodes:
        function = function_of(node, graph.values, state, torch.float64)
        values[node.name] = function(*(values[name] for name in node.inputs))
    return [values[name] for name in graph.outputs]


def function_of(
    node: Node,
    values: dict[str, Value],
    state: State,
    dtype: torch.dtype | None = None,
    arena: Arena | None = None,
) -> Function:
    """Returns a node as a function of its inputs, in the graph's dtype or in `dtype`; on quantised
    values the one is as exact as the other.

    Args:
        arena: stores the folded weights for all nodes that share them.
    """
    op = node.op
    keep = arena.tensors if arena is not None else _uncached
    if quantized_eager.is_quantized(node, values):
        function = quantized_eager.function_of(node, values, state, keep)
        if function is not None:
            return function if dtype is None else _with_floats_in(dtype, function)
    if isinstance(op, Conv):
        return _conv(op, values[node.name].shape, state, dtype, keep)
    if isinstance(op, Affine):
        return _affine(op, values[node.name].shape, state, dtype, keep)
    if isinstance(op, MaxPool):
        return _max_pool(op)
    if isinstance(op, AveragePool):
        own = op.kernel, op.stride, op.padding, op.ceil, op.count_padding, op.divisor
        return lambda x: F.avg_pool2d(x, *own)
    if isinstance(op, Pick):
        return _pick(op)
    if isinstance(op, Mean):
        shape = values[node.name].shape
        return lambda x: x.mean((2, 3)).view(shape)
    if isinstance(op, Concat):
        return lambda *parts: torch.cat(parts, 1)
    if isinstance(op, LayerNorm):
        return _layer_norm(op, state, dtype, keep)
    if isinstance(op, GroupNorm):
        return _group_norm(op, state, dtype, keep)
    if isinstance(op, SplitSum):
        return _split_sum(op)
    if isinstance(op, SplitSoftmax):
        shape = values[node.name].shape
        return lambda x: x.unflatten(1, (op.radix, -1)).softmax(1).reshape(shape)
    if isinstance(op, Convert):
        to = dtype or getattr(torch, op.dtype)
        return lambda x: x.to(to)
    return _torch(op, state, dtype, keep)


def _with_floats_in(dtype: torch.dtype, function: Function) -> Function:
    """Returns a function whose result, where it is no quantised one, is in `dtype`."""

    def run(*inputs: Tensor) -> Tensor:
        y = function(*inputs)
        return y.to(dtype) if y.is_floating_point() else y

    return run


def _uncached(key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Returns what `make` returns without storing it."""
    return make()


def _conv(
    op: Conv, shape: tuple[int, ...], state: State, dtype: torch.dtype | None, keep: Keep
) -> Function:
    problem = op.problem

    def lay_out() -> list[Tensor]:
        weight, bias = conv_weights(op, state, dtype)
        return [weight.contiguous(memory_format=torch.channels_last), bias]

    # a weight may be shared, under other norms and on other shapes
    folded = op.weight, op.bias, op.norm, problem.c, problem.r, problem.s, problem.groups
    weight, bias = keep(("eager", problem.math_mode, *folded), lay_out)
    input_shape, geometry = problem.input_shape, problem.geometry

    def run(x: Tensor, *residual: Tensor) -> Tensor:
        y = F.conv2d(x.reshape(input_shape), weight, bias, *geometry)
        return finish(y.reshape(shape), residual)

    finish = _finish(op, state, keep)
    return run


def _affine(
    op: Affine, shape: tuple[int, ...], state: State, dtype: torch.dtype | None, keep: Keep
) -> Function:
    finish = _finish(op, state, keep)
    if op.gate:
        return lambda x, gate, *residual: finish(x * gate, residual)
    if op.norm is None:
        return lambda x, *residual: finish(x, residual)
    around = (1, -1) + (1,) * (len(shape) - 2)
    both = keep(
        ("eager", op.norm),
        lambda: list(scale_and_shift(op, shape[1], state, dtype or torch.float32)),
    )
    scale, shift = (t.view(around) for t in both)
    if op.norm.mean is None and op.norm.bias is None:
        return lambda x, *residual: finish((x * scale).to(x.dtype), residual)
    if op.norm.mean is None and op.norm.weight is None:
        return lambda x, *residual: finish((x + shift).to(x.dtype), residual)
    return lambda x, *residual: finish((x * scale + shift).to(x.dtype), residual)


def _max_pool(op: MaxPool) -> Function:
    if op.padding_after is None:
        own = op.kernel, op.stride, op.padding, op.dilation, op.ceil
        return lambda x: F.max_pool2d(x, *own)
    (top, left), (bottom, right) = op.padding, op.padding_after
    window = op.kernel, op.stride, 0, op.dilation
    return lambda x: F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-math.inf), *window)


def _split_sum(op: SplitSum) -> Function:
    def run(x: Tensor, *gate: Tensor) -> Tensor:
        splits = (x * gate[0] if gate else x).unflatten(1, (op.radix, -1))
        y: Tensor = splits.sum(1)
        return y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y

    return run


def _layer_norm(op: LayerNorm, state: State, dtype: torch.dtype | None, keep: Keep) -> Function:
    """Returns a layer norm over the channels."""
    weight, bias = _scale_and_bias(op, state, dtype, keep)

    def run(x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, op.eps).movedim(-1, 1)

    return run


def _group_norm(op: GroupNorm, state: State, dtype: torch.dtype | None, keep: Keep) -> Function:
    """Returns a group norm, by ATen's function: torch.nn's refuses groups of one value."""
    weight, bias = _scale_and_bias(op, state, dtype, keep)
    finish = _finish(op, state, keep)
    return lambda x, *residual: finish(
        torch.group_norm(x, op.groups, weight, bias, op.eps), residual
    )


def _scale_and_bias(
    op: LayerNorm | GroupNorm, state: State, dtype: torch.dtype | None, keep: Keep
) -> tuple[Tensor | None, Tensor | None]:
    """Returns copies of a norm's weight and bias, each None if there is none."""

    def copied(name: str | None) -> Tensor | None:
        if name is None:
            return None
        key = "of a norm", name, dtype
        (tensor,) = keep(key, lambda: [state[name].detach().to(dtype=dtype, copy=True)])
        return tensor

    return copied(op.weight), copied(op.bias)


def _finish(
    op: Finished, state: State, keep: Keep
) -> Callable[[Tensor, tuple[Tensor, ...]], Tensor]:
    """Returns a function that applies activation and residual in the operation's order."""
    forward = ACTIVATIONS[op.activation].forward
    slope = _as_it_is(op.slope, state, keep) if isinstance(op.slope, str) else op.slope

    def finish(y: Tensor, residual: tuple[Tensor, ...]) -> Tensor:
        if op.residual_last:
            return forward(y, slope) + residual[0]
        return forward(y + residual[0] if residual else y, slope)

    return finish


def _as_it_is(name: str, state: State, keep: Keep) -> Tensor:
    (tensor,) = keep(("as it is", name), lambda: [state[name].detach()])
    return tensor


def _pick(op: Pick) -> Function:
    """Returns a function that picks channels and pixels; its result never shares memory with its
    input."""
    picked = {2: op.rows, 3: op.columns} | ({} if op.channels is None else {1: op.channels})
    padded = any((op.zeros, *op.around))
    # of the dimensions that are not copied whole by padding: a CUDA graph copies no indices
    indices: dict[torch.device, dict[int, Tensor]] = {}

    def run(x: Tensor) -> Tensor:
        if x.device not in indices:
            indices[x.device] = {
                dim: torch.tensor(at, dtype=torch.int64, device=x.device)
                for dim, at in picked.items()
                if not padded or at != tuple(range(x.shape[dim]))
            }
        y = x
        for dim, index in indices[x.device].items():
            y = y.index_select(dim, index)
        if padded:
            y = F.pad(y, (*op.around, 0, op.zeros))
        return y.contiguous(memory_format=torch.channels_last)

    return run


def _torch(op: Torch, state: State, dtype: torch.dtype | None, keep: Keep) -> Function:
    fixed = {name: _as_it_is(name, state, keep) for name in state_read_by(op)}
    if dtype is not None:
        fixed = {name: _widened(t) for name, t in fixed.items()}
    return torch_call(op, fixed)


def _widened(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t
