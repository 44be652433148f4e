"""Lowers average pools, picks of pixels and gates to native steps on the CPU."""

from torch import Tensor, tensor

from resfuse.kernels.cpu.program import Step, activation, kind
from resfuse.kernels.cpu.weight_layout import per_channel
from resfuse.kernels.engine.ir.graph import Affine, AveragePool, Graph, Node, Pick
from resfuse.kernels.engine.ir.lowered import Native
from resfuse.kernels.engine.memory.aliasing import channels_of
from resfuse.kernels.engine.memory.buffers import Arena


def windows(graph: Graph, node: Node, op: AveragePool | Pick, arena: Arena) -> Native:
    """Lowers operations that have a table for the rows of y and one for its columns: divisors of an
    average pool, or the pixels of x to pick.
    """
    n, c, h, w = graph.values[node.inputs[0]].shape
    _, k, p, q = graph.values[node.name].shape
    step = Step(N=n, C=c, K=k, H=h, W=w, P=p, Q=q)
    step.x, step.x_pitch = arena.address(node.inputs[0]), arena.pitch(node.inputs[0])
    step.y, step.y_pitch = arena.address(node.name), arena.pitch(node.name)
    if isinstance(op, Pick):
        step.kind = kind("pick")
        tables = op.rows, op.columns
    else:
        step.kind = kind("average_pool")
        (step.R, step.S), (step.stride_h, step.stride_w) = op.kernel, op.stride
        step.pad_h, step.pad_w = op.padding
        tables = _counts(op, 0, p, h), _counts(op, 1, q, w)
    rows, columns = arena.weights(("tables", *tables), lambda: [tensor(t).float() for t in tables])
    step.w, step.slope = rows.data_ptr(), columns.data_ptr()
    return Native([step])


def _counts(op: AveragePool, dim: int, windows: int, size: int) -> tuple[int, ...]:
    """Returns the divisor of each window along one dimension, as torch counts it: the values in the
    map, and those in the padding if `count_padding`, but none beyond the padding."""
    if op.divisor is not None:
        return (op.divisor if dim == 0 else 1,) * windows
    kernel, stride, padding = op.kernel[dim], op.stride[dim], op.padding[dim]
    starts = [i * stride - padding for i in range(windows)]
    if op.count_padding:
        return tuple(min(start + kernel, size + padding) - start for start in starts)
    return tuple(min(start + kernel, size) - max(start, 0) for start in starts)


def gate(graph: Graph, node: Node, op: Affine, arena: Arena, slopes: list[Tensor]) -> Native:
    """Lowers y = act(x * gate + residual) to one affine step an image, with the gate [N, C, 1, 1]
    as the scale and zero as the shift."""
    x, factor = node.inputs[:2]
    channels = channels_of(graph, node.name)
    n, _, h, w = graph.values[node.name].shape
    zero, *slope = arena.weights(
        ("gate", op.slope, channels), lambda: [per_channel(tensor([0.0] * channels)), *slopes]
    )
    steps = []
    for image in range(n):
        step = Step(
            kind=kind("affine"), N=1, P=1, Q=h * w, K=channels,
            w=arena.address(factor) + 4 * image * arena.pitch(factor), bias=zero.data_ptr(),
            slope=slope[0].data_ptr() if slope else 0,
            activation=activation(op.activation), residual_last=op.residual_last,
        )  # fmt: skip
        for name, place in (("x", x), ("residual", node.residual), ("y", node.name)):
            if place is not None:
                pitch = arena.pitch(place)
                setattr(step, name, arena.address(place) + 4 * image * h * w * pitch)
                setattr(step, f"{name}_pitch", pitch)
        steps.append(step)
    return Native(steps)
