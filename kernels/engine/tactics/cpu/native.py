"""Lowers single nodes to native steps on the CPU, in float32, bfloat16 and on quantised values: see
kernels/cpu.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from resfuse.kernels.cpu import conv_candidates
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.library import Storage, why_unavailable
from resfuse.kernels.cpu.program import (
    ACTIVATIONS,
    Step,
    activation,
    kind,
    lanes,
    storage_number,
    whole_vectors,
)
from resfuse.kernels.cpu.weight_layout import (
    integers_per_channel,
    per_channel,
    slopes,
    with_spare_vector,
)
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.folded_weights import conv_weights, scale_and_shift, slope_of
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
)
from resfuse.kernels.engine.ir.lowered import Native
from resfuse.kernels.engine.memory.aliasing import channels_of, pixels_of
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.tactics.cpu import native_maps
from resfuse.kernels.engine.tactics.cpu.quantized_fields import quantized_fields
from resfuse.kernels.engine.tactics.quantized_eager import quantized_weights

_NOWHERE: Mapping[str, int] = MappingProxyType({})
_STORAGES: dict[torch.dtype, Storage] = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "u8",
}  # fmt: skip


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or dtype not in _STORAGES:
        return (
            "native steps compute float32, bfloat16 and quantised values on the CPU, not "
            f"{dtype} on {device.type}"
        )
    return why_unavailable()


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    node = graph.nodes[at]
    op = node.op
    if isinstance(op, Conv):
        if conv_candidates.refusal(op.problem) is None:
            for config in conv_candidates.candidates(op.problem):
                yield Candidate("native", at, at + 1, tuple(asdict(config).items()))
    elif _is_supported(graph, node):
        yield Candidate("native", at, at + 1)


def scratch(graph: Graph, candidate: Candidate) -> int:
    node = graph.nodes[candidate.start]
    op = node.op
    if isinstance(op, Affine) and op.gate and storage_of(graph, node) != "fp32":
        n, channels = graph.values[node.inputs[1]].shape[:2]
        return 4 * n * whole_vectors(channels)
    if isinstance(op, GroupNorm):
        return native_maps.group_norm_bytes(graph, node, op, storage_of(graph, node))
    if not isinstance(op, Conv):
        return 0
    config = NativeConfig(**candidate.settings)
    return 4 * threads() * conv_candidates.scratch_floats(op.problem, config)


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Native:
    node = graph.nodes[candidate.start]
    op = node.op
    if isinstance(op, Conv):
        config = NativeConfig(**candidate.settings)
        step = conv_step(graph, node, config, state, arena)
        if step.scratch_pitch > 0:
            step.scratch = arena.scratch(candidate.start)
        return Native([step])
    if isinstance(op, Affine) and op.gate:
        slopes_of_gate = _slopes(op, channels_of(graph, node.name), state)
        storage = storage_of(graph, node)
        memory = arena.scratch(candidate.start) if storage != "fp32" else 0
        return native_maps.gate(graph, node, op, arena, slopes_of_gate, storage, memory)
    if isinstance(op, Affine):
        return _affine(graph, node, op, state, arena)
    if isinstance(op, AveragePool | Pick):
        return native_maps.windows(graph, node, op, arena, storage_of(graph, node))
    if isinstance(op, Convert):
        return native_maps.convert(graph, node, op, arena)
    if isinstance(op, Concat):
        return _concat(graph, node, arena)
    if isinstance(op, LayerNorm):
        return native_maps.layer_norm(graph, node, op, state, arena, storage_of(graph, node))
    if isinstance(op, GroupNorm):
        own = _slopes(op, channels_of(graph, node.name), state)
        storage, memory = storage_of(graph, node), arena.scratch(candidate.start)
        return native_maps.group_norm(graph, node, op, state, arena, own, storage, memory)
    if isinstance(op, SplitSum | SplitSoftmax):
        return native_maps.splits(graph, node, op, arena, storage_of(graph, node))
    if isinstance(op, MaxPool):
        return Native([max_pool_step(graph, node, arena)])
    assert isinstance(op, Mean)
    n, c, h, w = graph.values[node.inputs[0]].shape
    step = Step(
        kind=kind("mean"), N=n, C=c, K=c, H=h, W=w, storage=_number(graph, node),
        **_places(node, arena), **quantized_fields(graph, node),
    )  # fmt: skip
    return Native([step])


def storage_of(graph: Graph, node: Node) -> Storage:
    """Returns the type that a node's values are stored in: the one of its input, where it stores
    quantised values as float32."""
    quantized = graph.values[node.inputs[0]].quantization is not None
    return "u8" if quantized else _STORAGES[graph.values[node.name].dtype]


def _number(graph: Graph, node: Node) -> int:
    return storage_number(storage_of(graph, node))


def conv_step(
    graph: Graph,
    node: Node,
    config: NativeConfig,
    state: State,
    arena: Arena,
    local: Mapping[str, int] = _NOWHERE,
) -> Step:
    """Returns the step of a convolution, without the address of its scratch memory.

    Args:
        local: for each value outside the arena, the floats from one pixel to the next.
    """
    op = node.op
    assert isinstance(op, Conv)

    storage = conv_candidates.storage_of(op.problem)

    x = graph.values[node.inputs[0]].quantization

    def lay_out() -> list[Tensor]:
        if x is None:
            weight, bias = conv_weights(op, state, torch.float32)
            sums = []
        else:
            weight, how = quantized_weights(op, state, x)
            bias, sums = how.bias, [per_channel(how.scale), integers_per_channel(how.offset)]
        groups = op.problem.groups
        laid_out = conv_candidates.layout_weight(config.form, weight, groups, storage)
        parameters = [per_channel(bias), *sums, *_slopes(op, op.problem.k, state)]
        if conv_candidates.lacking(op.problem.k, op.problem.groups):
            parameters = list(map(with_spare_vector, parameters))
        return [laid_out, *parameters]

    # a weight may be shared, under other norms and activations
    key = (
        op.weight, op.bias, op.norm, op.slope, op.correction, x, op.problem.groups, config.form,
        storage,
    )  # fmt: skip
    weight, bias, *slope = arena.weights(key, lay_out)
    fields = quantized_fields(graph, node)
    if x is not None:
        scale, offset, *slope = slope
        fields |= {"scale": scale.data_ptr(), "offset": offset.data_ptr()}
    return conv_candidates.conv_step(
        op.problem,
        config,
        w=weight.data_ptr(),
        bias=bias.data_ptr(),
        slope=slope[0].data_ptr() if slope else 0,
        C=op.problem.c + (0 if node.inputs[0] in local else arena.zeros_behind(node.inputs[0])),
        **_places(node, arena, local),
        **fields,
    )


def _affine(graph: Graph, node: Node, op: Affine, state: State, arena: Arena) -> Native:
    channels = channels_of(graph, node.name)

    def lay_out() -> list[Tensor]:
        both = scale_and_shift(op, channels, state)
        return [*map(per_channel, both), *_slopes(op, channels, state)]

    scale, shift, *slope = arena.weights((op.norm, op.slope, channels), lay_out)
    step = Step(
        kind=kind("affine"), N=1, P=1, Q=pixels_of(graph, node.name), K=channels,
        w=scale.data_ptr(), bias=shift.data_ptr(),
        slope=slope[0].data_ptr() if slope else 0,
        activation=activation(op.activation), residual_last=op.residual_last,
        storage=_number(graph, node), **_places(node, arena), **quantized_fields(graph, node),
    )  # fmt: skip
    return Native([step])


def max_pool_step(
    graph: Graph, node: Node, arena: Arena | None, local: Mapping[str, int] = _NOWHERE
) -> Step:
    """Returns the step of a max-pool, without addresses if there is no arena; `local` is as for
    `conv_step`.
    """
    op = node.op
    assert isinstance(op, MaxPool)
    n, c, h, w = graph.values[node.inputs[0]].shape
    _, _, p, q = graph.values[node.name].shape
    (r, s), (stride_h, stride_w) = op.kernel, op.stride
    (pad_h, pad_w), (dilation_h, dilation_w) = op.padding, op.dilation
    return Step(
        kind=kind("max_pool"), N=n, C=c, K=c, H=h, W=w, P=p, Q=q, R=r, S=s,
        stride_h=stride_h, stride_w=stride_w, pad_h=pad_h, pad_w=pad_w,
        dilation_h=dilation_h, dilation_w=dilation_w, storage=_number(graph, node),
        **quantized_fields(graph, node), **({} if arena is None else _places(node, arena, local)),
    )  # fmt: skip


def _concat(graph: Graph, node: Node, arena: Arena) -> Native:
    """Returns the steps that copy each part that does not lie in its place in the whole. What lies
    behind a part's last vector there is another's, and is not written."""
    steps = []
    to, pitch = arena.address(node.name), arena.pitch(node.name)
    for part in node.inputs:
        channels = channels_of(graph, part)
        if arena.address(part) != to:
            one, zero = arena.weights((None, None, channels), partial(_same, channels))
            steps.append(
                Step(
                    kind=kind("affine"), N=1, P=1, Q=pixels_of(graph, part),
                    K=whole_vectors(channels), unstored=-channels % lanes(),
                    x=arena.address(part), x_pitch=arena.pitch(part), y=to, y_pitch=pitch,
                    w=one.data_ptr(), bias=zero.data_ptr(), storage=_number(graph, node),
                    **quantized_fields(graph, node),
                )
            )  # fmt: skip
        to += arena.element_bytes(node.name) * channels
    return Native(steps)


def _same(channels: int) -> list[Tensor]:
    """Returns a scale and a shift that change nothing."""
    return [*map(per_channel, scale_and_shift(Affine(), channels, {}))]


def _places(node: Node, arena: Arena, local: Mapping[str, int] = _NOWHERE) -> dict[str, int]:
    """Returns the addresses and pitches of a node's inputs and output."""
    places = {}
    for field, name in ("x", node.inputs[0]), ("y", node.name), ("residual", node.residual):
        if name is not None:
            places[field] = 0 if name in local else arena.address(name)
            places[f"{field}_pitch"] = local[name] if name in local else arena.pitch(name)
    return places


def _slopes(op: Finished, channels: int, state: State) -> list[Tensor]:
    """Returns a slope for each channel, if the activation has one."""
    slope = slope_of(op, state)
    if slope is None:
        return []
    return [slopes(slope, channels)]


def _is_supported(graph: Graph, node: Node) -> bool:
    """Returns whether there is a step for a node that is not a convolution."""
    op = node.op
    if not _is_available(graph, node):
        return False
    if isinstance(op, Convert):
        return len(graph.values[node.name].shape) in (2, 4)
    if isinstance(op, Affine | GroupNorm):
        return op.activation in ACTIVATIONS
    if isinstance(op, SplitSum | SplitSoftmax):
        return all(graph.values[name].quantization is None for name in node.inputs)
    return isinstance(op, MaxPool | AveragePool | Pick | Mean | Concat | LayerNorm)


def _is_available(graph: Graph, node: Node) -> bool:
    """Returns whether there are steps here for the dtype of a node's values, which is one, or two
    where it converts them."""
    values = [graph.values[name] for name in (node.name, *node.inputs)]
    if any(v.dtype == torch.uint8 and v.quantization is None for v in values):
        return False
    read = {v.dtype for v in values[1:]}
    dtypes = read | {values[0].dtype}
    narrowed = read == {torch.uint8} and isinstance(node.op, Affine | Mean)  # stored as float32
    alike = len(dtypes) == 1 or narrowed or isinstance(node.op, Convert)
    if not dtypes <= _STORAGES.keys() or not alike:
        return False
    return all(why_unavailable(_STORAGES[dtype]) is None for dtype in dtypes)
