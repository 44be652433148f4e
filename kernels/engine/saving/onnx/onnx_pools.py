"""Pools in ONNX. Windows that reach beyond the far edge are written as padding there, since
runtimes differ in what `ceil_mode` means."""

import torch
import torch.nn.functional as F

from resfuse.kernels.engine.ir.graph import AveragePool, MaxPool, Node
from resfuse.kernels.engine.saving.onnx.onnx_builder import OnnxBuilder


def max_pool(build: OnnxBuilder, node: Node, op: MaxPool) -> None:
    y = build.add(
        "MaxPool", [build.names[node.inputs[0]]], kernel_shape=list(op.kernel),
        strides=list(op.stride), dilations=list(op.dilation),
        pads=[*op.padding, *_below(build, node, op, op.dilation)],
    )  # fmt: skip
    build.store(node, y)


def average_pool(build: OnnxBuilder, node: Node, op: AveragePool) -> None:
    """An average over windows, times a factor where torch divides by another number than ONNX."""
    plain = not op.ceil and op.divisor is None
    y = build.add(
        "AveragePool", [build.names[node.inputs[0]]], kernel_shape=list(op.kernel),
        strides=list(op.stride), pads=[*op.padding, *_below(build, node, op, (1, 1))],
        count_include_pad=int(op.count_padding or not plain),
    )  # fmt: skip
    if not plain:
        size = op.kernel[0] * op.kernel[1]
        y = build.add("Mul", [y, build.constant(size / _divisors(build, node, op), "factor")])
    build.store(node, y)


def _below(
    build: OnnxBuilder, node: Node, op: MaxPool | AveragePool, dilation: tuple[int, int]
) -> list[int]:
    """Returns the rows and columns beyond the far edge that the last windows reach."""
    if isinstance(op, MaxPool) and op.padding_after is not None:
        return list(op.padding_after)
    if not op.ceil:
        return list(op.padding)
    lengths, windows = build.value(node.inputs[0]).shape[2:], build.value(node.name).shape[2:]
    return [
        max(0, (windows[i] - 1) * op.stride[i] + dilation[i] * (op.kernel[i] - 1) + 1
            - lengths[i] - op.padding[i])
        for i in (0, 1)
    ]  # fmt: skip


def _divisors(build: OnnxBuilder, node: Node, op: AveragePool) -> torch.Tensor:
    """Returns what torch divides the sum of each window by, [1, 1, P, Q]."""
    ones = torch.ones(1, 1, *build.value(node.inputs[0]).shape[2:])
    window = op.kernel, op.stride, op.padding, op.ceil
    sums = F.avg_pool2d(ones, *window, True, 1)
    return sums / F.avg_pool2d(ones, *window, op.count_padding, op.divisor)
