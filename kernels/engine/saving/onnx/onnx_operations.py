"""What each operation of a graph is in ONNX."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from resfuse.kernels.engine.ir.folded_weights import conv_weights, scale_and_shift, slope_of
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Convert,
    Finished,
    GroupNorm,
    LayerNorm,
    MaxPool,
    Mean,
    Node,
    Pick,
    SplitSoftmax,
    SplitSum,
    Torch,
)
from resfuse.kernels.engine.saving.onnx.onnx_activations import activated
from resfuse.kernels.engine.saving.onnx.onnx_builder import OnnxBuilder
from resfuse.kernels.engine.saving.onnx.onnx_pools import average_pool, max_pool
from resfuse.kernels.engine.saving.onnx.onnx_torch import torch_operation
from resfuse.kernels.ops.quantization import quantize_weights


def _conv(build: OnnxBuilder, node: Node, op: Conv) -> None:
    """A convolution, or Gemm where it is a linear layer.

    The bias stays float32: it is exact then, TensorRT reads no other, and ONNX Runtime makes the
    int32 that its integer kernels want by itself.
    """
    x, of_x, of_y = build.names[node.inputs[0]], build.value(node.inputs[0]), build.value(node.name)
    weight, bias = conv_weights(op, build.state, torch.float64)
    if op.correction is not None:
        bias = bias + build.state[op.correction]
    linear = len(of_y.shape) == 2
    if linear:
        weight = weight.flatten(1)
    if of_x.quantization is None:
        w = build.constant(weight.float(), "weight")
    else:
        w = build.weight(*quantize_weights(weight))
    b = build.constant(bias.float(), "bias")
    if linear:
        if len(of_x.shape) > 2:
            x = build.add("Flatten", [x], axis=1)
            if of_x.quantization is not None:  # integer kernels want the pair next to the layer
                x = build.quantized(x, of_x.quantization)
        y = build.add("Gemm", [x, w, b], transB=1)
    else:
        g = op.problem.geometry
        y = build.add(
            "Conv", [x, w, b], kernel_shape=[op.problem.r, op.problem.s], strides=list(g.stride),
            pads=[*g.padding, *g.padding], dilations=list(g.dilation), group=g.groups,
        )  # fmt: skip
    build.store(node, _finished(build, node, op, y))


def _affine(build: OnnxBuilder, node: Node, op: Affine) -> None:
    y = build.names[node.inputs[0]]
    shape = build.value(node.name).shape
    if op.gate:
        y = build.add("Mul", [y, build.names[node.inputs[1]]])
    if op.norm is not None:
        scale, shift = scale_and_shift(op, shape[1], build.state)
        around = (-1, *(1,) * (len(shape) - 2))
        y = build.add("Mul", [y, build.constant(scale.view(around), "scale")])
        y = build.add("Add", [y, build.constant(shift.view(around), "shift")])
    build.store(node, _finished(build, node, op, y))


def _finished(build: OnnxBuilder, node: Node, op: Finished, y: str) -> str:
    """Adds residual and activation in the operation's order."""
    dims = len(build.value(node.name).shape)
    added = None if node.residual is None else build.names[node.residual]
    if added is not None and not op.residual_last:
        y = build.add("Add", [y, added])
    y = activated(build, y, op.activation, slope_of(op, build.state), dims)
    return build.add("Add", [y, added]) if added is not None and op.residual_last else y


def _pick(build: OnnxBuilder, node: Node, op: Pick) -> None:
    """A slice of all dimensions that are picked in equal steps, a gather of each other one."""
    y, shape = build.names[node.inputs[0]], build.value(node.inputs[0]).shape
    picked = {2: op.rows, 3: op.columns} | ({} if op.channels is None else {1: op.channels})
    picked = {dim: at for dim, at in picked.items() if at != tuple(range(shape[dim]))}
    even = {dim: at for dim, at in picked.items() if _step(at)}
    if even:
        starts, steps = [at[0] for at in even.values()], [_step(at) for at in even.values()]
        ends = [at[-1] + 1 for at in even.values()]
        told = {"starts": starts, "ends": ends, "axes": list(even), "steps": steps}
        y = build.add("Slice", [y, *(_ints(build, each, name) for name, each in told.items())])
    for dim, at in picked.items():
        if dim not in even:
            y = build.add("Gather", [y, _ints(build, at, "indices")], axis=dim)
    if op.zeros or any(op.around):
        left, right, top, bottom = op.around
        pads = [0, 0, top, left, 0, op.zeros, bottom, right]
        y = build.add("Pad", [y, _ints(build, pads, "pads")])
    build.store(node, y)


def _step(at: Sequence[int]) -> int:
    """Returns the distance of indices that ascend in equal steps, 0 where they do not."""
    step = at[1] - at[0] if len(at) > 1 else 1
    return step if step > 0 and tuple(at) == tuple(range(at[0], at[-1] + 1, step)) else 0


def _mean(build: OnnxBuilder, node: Node, op: Mean) -> None:
    y = build.add("GlobalAveragePool", [build.names[node.inputs[0]]])
    value = build.value(node.name)
    if len(value.shape) == 2:
        if value.quantization is not None:
            y = build.quantized(y, value.quantization)
        y = build.add("Flatten", [y], axis=1)
    build.store(node, y)


def _concat(build: OnnxBuilder, node: Node, op: Concat) -> None:
    build.store(node, build.add("Concat", [build.names[name] for name in node.inputs], axis=1))


def _convert(build: OnnxBuilder, node: Node, op: Convert) -> None:
    """Nothing but the pair that a quantised value gets: the others are real numbers already."""
    if op.dtype not in ("uint8", "int8", "float32"):
        raise ValueError(f"{node.name!r} is in {op.dtype}; accepted: float32 and int8")
    build.store(node, build.names[node.inputs[0]])


def _layer_norm(build: OnnxBuilder, node: Node, op: LayerNorm) -> None:
    y, shape = build.names[node.inputs[0]], build.value(node.name).shape
    maps, channels = len(shape) == 4, shape[1]
    if maps:
        y = build.add("Transpose", [y], perm=[0, 2, 3, 1])
    tensors = _scale_and_bias(build, op, channels)
    y = build.add("LayerNormalization", [y, *tensors], opset=17, axis=-1, epsilon=op.eps)
    build.store(node, build.add("Transpose", [y], perm=[0, 3, 1, 2]) if maps else y)


def _group_norm(build: OnnxBuilder, node: Node, op: GroupNorm) -> None:
    y, shape = build.names[node.inputs[0]], build.value(node.name).shape
    rows = len(shape) == 2
    if rows:  # it wants dimensions behind the channels
        y = build.add("Unsqueeze", [y, _ints(build, [2], "axes")])
    tensors = _scale_and_bias(build, op, shape[1])
    y = build.add(
        "GroupNormalization", [y, *tensors], opset=21, num_groups=op.groups, epsilon=op.eps
    )
    y = build.add("Flatten", [y], axis=1) if rows else y
    build.store(node, _finished(build, node, op, y))


def _split_sum(build: OnnxBuilder, node: Node, op: SplitSum) -> None:
    y, shape = build.names[node.inputs[0]], build.value(node.name).shape
    if op.gate:
        y = build.add("Mul", [y, build.names[node.inputs[1]]])
    y = build.add("Reshape", [y, _ints(build, _splits_of(op, shape), "splits")])
    build.store(node, build.add("ReduceSum", [y, _ints(build, [1], "axes")], keepdims=0))


def _split_softmax(build: OnnxBuilder, node: Node, op: SplitSoftmax) -> None:
    y, shape = build.names[node.inputs[0]], build.value(node.name).shape
    n, channels, *pixels = shape
    splits = _splits_of(op, (n, channels // op.radix, *pixels))
    y = build.add("Reshape", [y, _ints(build, splits, "splits")])
    y = build.add("Softmax", [y], axis=1)
    build.store(node, build.add("Reshape", [y, _ints(build, [0, channels, *pixels], "shape")]))


def _splits_of(op: SplitSum | SplitSoftmax, of_each: Sequence[int]) -> list[int]:
    """Returns the shape of splits of a shape each; 0 copies the batch size of what is reshaped."""
    _, *rest = of_each
    return [0, op.radix, *rest]


def _scale_and_bias(build: OnnxBuilder, op: LayerNorm | GroupNorm, channels: int) -> list[str]:
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    return [
        build.constant((other if name is None else build.state[name]).float(), what)
        for name, other, what in ((op.weight, ones, "weight"), (op.bias, zeros, "bias"))
    ]


def _ints(build: OnnxBuilder, numbers: Sequence[int], name: str) -> str:
    return build.constant(np.array(list(numbers), np.int64), name)


# Each function takes the operation that it stands beside.
OPERATIONS: dict[type, Callable[[OnnxBuilder, Node, Any], None]] = {
    Conv: _conv,
    Affine: _affine,
    MaxPool: max_pool,
    AveragePool: average_pool,
    Pick: _pick,
    Mean: _mean,
    Concat: _concat,
    Convert: _convert,
    LayerNorm: _layer_norm,
    GroupNorm: _group_norm,
    SplitSum: _split_sum,
    SplitSoftmax: _split_softmax,
    Torch: torch_operation,
}
