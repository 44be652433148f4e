"""Lowers average pools, picks of pixels, gates, split attention, norms and conversions to steps on
the CPU.
"""

from torch import Tensor, tensor, uint8
from torch.nn.functional import pad

from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.library import Storage
from resfuse.kernels.cpu.program import (
    Step,
    activation,
    kind,
    scratch_floats,
    shared_floats,
    storage_number,
    whole_lines,
    whole_vectors,
)
from resfuse.kernels.cpu.weight_layout import per_channel
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Convert,
    Graph,
    GroupNorm,
    LayerNorm,
    Node,
    Pick,
    SplitSoftmax,
    SplitSum,
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
    average pool, or the pixels of x to pick, -1 for zeros. Channels that are not one after another
    have a table, too.
    """
    n, c, h, w = graph.values[node.inputs[0]].shape
    _, k, p, q = graph.values[node.name].shape
    step = Step(
        N=n, C=c, K=k, H=h, W=w, P=p, Q=q, storage=storage_number(storage),
        **quantized_fields(graph, node),
    )  # fmt: skip
    step.x, step.x_pitch = arena.address(node.inputs[0]), arena.pitch(node.inputs[0])
    step.y, step.y_pitch = arena.address(node.name), arena.pitch(node.name)
    left, right, top, bottom = op.around if isinstance(op, Pick) else (0, 0, 0, 0)
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
    ends = (top, bottom), (left, right), (0, 0)
    rows, columns, *channels = arena.weights(
        ("tables", *tables, ends),
        lambda: [pad(tensor(t).float(), n, value=-1) for t, n in zip(tables, ends, strict=False)],
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


def splits(
    graph: Graph, node: Node, op: SplitSum | SplitSoftmax, arena: Arena, storage: Storage
) -> Native:
    """Lowers a sum of splits of the channels, or a softmax over them, to one step."""
    x, *gate = node.inputs
    n, channels, h, w = (*graph.values[x].shape, 1, 1)[:4]
    step = Step(
        kind=kind("split_sum" if isinstance(op, SplitSum) else "split_softmax"),
        N=n, P=h, Q=w, K=channels // op.radix, groups=op.radix,
        x=arena.address(x), x_pitch=arena.pitch(x),
        y=arena.address(node.name), y_pitch=arena.pitch(node.name),
        storage=storage_number(storage),
    )  # fmt: skip
    if gate:
        step.gate, step.gate_pitch = arena.address(gate[0]), arena.pitch(gate[0])
    return Native([step])


def _scale_of(graph: Graph, name: str) -> dict[str, float]:
    """Returns the fields that say how a value to convert is stored, if it is quantised."""
    stored = graph.values[name].quantization
    return {} if stored is None else {"x_zero": stored.zero_point, "x_scale": stored.scale}


def layer_norm(
    graph: Graph, node: Node, op: LayerNorm, state: State, arena: Arena, storage: Storage
) -> Native:
    """Lowers a layer norm over the channels to one step."""
    x, channels = node.inputs[0], channels_of(graph, node.name)
    weight, bias = arena.weights(
        ("of a norm", op.weight, op.bias, channels), lambda: _scale_and_bias(op, channels, state)
    )
    step = Step(
        kind=kind("layer_norm"), N=1, P=1, Q=pixels_of(graph, x), K=channels,
        x=arena.address(x), x_pitch=arena.pitch(x),
        y=arena.address(node.name), y_pitch=arena.pitch(node.name),
        w=weight.data_ptr(), bias=bias.data_ptr(), eps=op.eps, storage=storage_number(storage),
    )  # fmt: skip
    return Native([step])


def _scale_and_bias(op: LayerNorm | GroupNorm, channels: int, state: State) -> list[Tensor]:
    weight = tensor([1.0] * channels) if op.weight is None else state[op.weight]
    bias = tensor([0.0] * channels) if op.bias is None else state[op.bias]
    return [per_channel(t.detach()) for t in (weight, bias)]


def group_norm_bytes(graph: Graph, node: Node, op: GroupNorm, storage: Storage) -> int:
    """Returns the bytes of scratch memory that a group norm needs: the moments of all groups, and
    what each thread needs."""
    step = Step(**_of_groups(graph, node, op, storage), kind=kind("group_moments"))
    return 4 * (whole_lines(shared_floats(step)) + threads() * whole_lines(scratch_floats(step)))


def group_norm(
    graph: Graph,
    node: Node,
    op: GroupNorm,
    state: State,
    arena: Arena,
    slopes: list[Tensor],
    storage: Storage,
    memory: int,
) -> Native:
    """Lowers a group norm to a step that takes the moments of all groups and one that normalises.

    Args:
        memory: the address of as much scratch memory as `group_norm_bytes` says.
    """
    x, channels = node.inputs[0], channels_of(graph, node.name)
    weight, bias, *slope = arena.weights(
        ("of a norm", op.weight, op.bias, op.slope, channels),
        lambda: [*_scale_and_bias(op, channels, state), *slopes],
    )
    moments = Step(**_of_groups(graph, node, op, storage), kind=kind("group_moments"), y=memory)
    normalised = Step(
        **_of_groups(graph, node, op, storage), kind=kind("group_norm"), scale=memory,
        w=weight.data_ptr(), bias=bias.data_ptr(), eps=op.eps,
        slope=slope[0].data_ptr() if slope else 0,
        activation=activation(op.activation), residual_last=op.residual_last,
        y=arena.address(node.name), y_pitch=arena.pitch(node.name),
    )  # fmt: skip
    if node.residual is not None:
        normalised.residual = arena.address(node.residual)
        normalised.residual_pitch = arena.pitch(node.residual)
    for step in (moments, normalised):
        step.x, step.x_pitch = arena.address(x), arena.pitch(x)
        step.scratch = memory + 4 * whole_lines(shared_floats(step))
        step.scratch_pitch = whole_lines(scratch_floats(step))
    return Native([moments, normalised])


def _of_groups(graph: Graph, node: Node, op: GroupNorm, storage: Storage) -> dict[str, int]:
    """Returns the fields that both steps of a group norm have in common, without addresses."""
    n, channels, h, w = (*graph.values[node.name].shape, 1, 1)[:4]
    number = storage_number(storage)
    return {"N": n, "P": h, "Q": w, "K": channels, "groups": op.groups, "storage": number}


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
