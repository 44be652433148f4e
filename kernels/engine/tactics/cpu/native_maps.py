"""Lowers average pools, picks of pixels, gates, layer norms and conversions to native steps on the
CPU.
"""

from torch import Tensor, tensor, uint8

from resfuse.kernels.cpu.library import Storage
from resfuse.kernels.cpu.program import Step, activation, kind, storage_number, whole_vectors
from resfuse.kernels.cpu.weight_layout import per_channel
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Convert,
    Graph,
    LayerNorm,
    Node,
    Pick,
    State,
)
from resfuse.kernels.engine.ir.lowered import Native
from resfuse.kernels.engine.memory.aliasing import channels_of, pixels_of
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics.cpu.quantized_fields import quantized_fields


def windows(
    graph: Graph, node: Node, op: AveragePool | Pick, arena: Arena, storage: Storage
) -> Native:
    """Lowers operations that have a table for the rows of y and one for its columns: divisors of an
    average pool, or the pixels of x to pick. Channels that are not one after another have a table,
    too.
    """
    n, c, h, w = graph.values[node.inputs[0]].shape
    _, k, p, q = graph.values[node.name].shape
    step = Step(
        N=n, C=c, K=k, H=h, W=w, P=p, Q=q, storage=storage_number(storage),
        **quantized_fields(graph, node),
    )  # fmt: skip
    step.x, step.x_pitch = arena.address(node.inputs[0]), arena.pitch(node.inputs[0])
    step.y, step.y_pitch = arena.address(node.name), arena.pitch(node.name)
    if isinstance(op, Pick):
        step.kind = kind("pick")
        tables: tuple[tuple[int, ...], ...] = (op.rows, op.columns)
        if op.channels is not None:
            step.C = len(op.channels)
            if op.scatters:
                tables = (*tables, op.channels)
            else:
                first = op.channels[0] * arena.element_bytes(node.inputs[0])
                step.x = arena.address(node.inputs[0]) + first
    else:
        step.kind = kind("average_pool")
        (step.R, step.S), (step.stride_h, step.stride_w) = op.kernel, op.stride
        step.pad_h, step.pad_w = op.padding
        tables = _counts(op, 0, p, h), _counts(op, 1, q, w)
    rows, columns, *channels = arena.weights(
        ("tables", *tables), lambda: [tensor(t).float() for t in tables]
    )
    step.w, step.slope = rows.data_ptr(), columns.data_ptr()
    if channels:
        step.bias = channels[0].data_ptr()
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


def gate(
    graph: Graph,
    node: Node,
    op: Affine,
    arena: Arena,
    slopes: list[Tensor],
    storage: Storage,
    memory: int,
) -> Native:
    """Lowers y = act(x * gate + residual) to one affine step an image, with the gate [N, C, 1, 1]
    as the scale and zero as the shift.

    Args:
        memory: the address of scratch memory where a gate that is not float32 is converted to it,
            as scales are.
    """
    x, factor = node.inputs[:2]
    channels = channels_of(graph, node.name)
    n, _, h, w = graph.values[node.name].shape
    zero, *slope = arena.weights(
        ("gate", op.slope, channels), lambda: [per_channel(tensor([0.0] * channels)), *slopes]
    )
    steps: list[Step] = []
    scales, pitch_of_scales = arena.address(factor), arena.pitch(factor)
    if storage != "fp32":
        whole = whole_vectors(channels)
        steps.append(
            Step(
                kind=kind("to_fp32"), N=n, P=1, Q=1, C=channels, K=whole,
                x=scales, x_pitch=pitch_of_scales, y=memory, y_pitch=whole,
                storage=storage_number(storage), **_scale_of(graph, factor),
            )
        )  # fmt: skip
        scales, pitch_of_scales = memory, whole
    for image in range(n):
        step = Step(
            kind=kind("affine"), N=1, P=1, Q=h * w, K=channels,
            w=scales + 4 * image * pitch_of_scales, bias=zero.data_ptr(),
            slope=slope[0].data_ptr() if slope else 0, storage=storage_number(storage),
            activation=activation(op.activation), residual_last=op.residual_last,
            **quantized_fields(graph, node),
        )  # fmt: skip
        for name, place in (("x", x), ("residual", node.residual), ("y", node.name)):
            if place is not None:
                pitch = arena.pitch(place)
                before = arena.element_bytes(place) * image * h * w * pitch
                setattr(step, name, arena.address(place) + before)
                setattr(step, f"{name}_pitch", pitch)
        steps.append(step)
    return Native(steps)


def _scale_of(graph: Graph, name: str) -> dict[str, float]:
    """Returns the fields that say how a value to convert is stored, if it is quantised."""
    stored = graph.values[name].quantization
    return {} if stored is None else {"x_zero": stored.zero_point, "x_scale": stored.scale}


def layer_norm(
    graph: Graph, node: Node, op: LayerNorm, state: State, arena: Arena, storage: Storage
) -> Native:
    """Lowers a layer norm over the channels to one step."""
    x, channels = node.inputs[0], channels_of(graph, node.name)

    def lay_out() -> list[Tensor]:
        weight = tensor([1.0] * channels) if op.weight is None else state[op.weight]
        bias = tensor([0.0] * channels) if op.bias is None else state[op.bias]
        return [*(per_channel(t.detach()) for t in (weight, bias)), per_channel(tensor([op.eps]))]

    weight, bias, eps = arena.weights((op, channels), lay_out)
    step = Step(
        kind=kind("layer_norm"), N=1, P=1, Q=pixels_of(graph, x), K=channels,
        x=arena.address(x), x_pitch=arena.pitch(x),
        y=arena.address(node.name), y_pitch=arena.pitch(node.name),
        w=weight.data_ptr(), bias=bias.data_ptr(), slope=eps.data_ptr(),
        storage=storage_number(storage),
    )  # fmt: skip
    return Native([step])


def convert(graph: Graph, node: Node, op: Convert, arena: Arena) -> Native:
    """Lowers a conversion to a step of the library for the narrower type."""
    x, channels = node.inputs[0], channels_of(graph, node.name)
    dtypes = graph.values[x].dtype, graph.values[node.name].dtype
    step = Step(
        kind=kind({"bfloat16": "to_bf16", "uint8": "to_u8", "float32": "to_fp32"}[op.dtype]),
        N=1, P=1, Q=pixels_of(graph, x), C=channels, K=channels + arena.zeros_behind(node.name),
        x=arena.address(x), x_pitch=arena.pitch(x),
        y=arena.address(node.name), y_pitch=arena.pitch(node.name),
        storage=storage_number("u8" if uint8 in dtypes else "bf16"),
        **quantized_fields(graph, node),
    )  # fmt: skip
    return Native([step])
