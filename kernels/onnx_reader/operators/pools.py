"""Pools: torch's layers where they place the same windows; a padding before them elsewhere."""

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from resfuse.kernels.onnx_reader.operators.windows import Window, window_of
from resfuse.kernels.onnx_reader.reading.node import OnnxNode, Operators
from resfuse.kernels.onnx_reader.reading.values import Computed, Value

if TYPE_CHECKING:
    from resfuse.kernels.onnx_reader.reading.graph_reader import Reader

Layers = dict[int, Callable[..., nn.Module]]  # by the dimensions of an image, or of a tensor

_MAX: Layers = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_AVERAGE: Layers = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_SUM: dict[int, Callable[..., Any]] = {2: F.avg_pool2d, 3: F.avg_pool3d}
_GLOBAL_AVERAGE: Layers = {
    3: nn.AdaptiveAvgPool1d,
    4: nn.AdaptiveAvgPool2d,
    5: nn.AdaptiveAvgPool3d,
}
_GLOBAL_MAX: Layers = {
    3: nn.AdaptiveMaxPool1d,
    4: nn.AdaptiveMaxPool2d,
    5: nn.AdaptiveMaxPool3d,
}


def _max_pool(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
    x = reader.computed(x)
    window = _window(node, x)
    node.attribute("storage_order")  # of the indices
    dims = len(window.kernel)
    if _as_torch_rounding_up(window, x):
        window = replace(window, after=window.before, ceil=True)
    elif not _as_torch(window):
        x = reader.call(F.pad, x, _whole_windows(window, x), "constant", float("-inf"))
        window = replace(window, before=(0,) * dims, after=(0,) * dims, ceil=False)
    return reader.layer(
        node,
        lambda: _MAX[dims](
            window.kernel, window.stride, window.before, window.dilation, ceil_mode=window.ceil
        ),
        x,
    )


def _average_pool(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
    x = reader.computed(x)
    window = _window(node, x)
    with_padding = bool(node.attribute("count_include_pad", 0))
    dims = len(window.kernel)
    if max(window.dilation) > 1:
        raise node.refusal(f"dilations={list(window.dilation)}")
    # A window beyond the padding counts what lies inside; torch agrees on one that is not padded.
    if _as_torch(window):
        return reader.layer(
            node,
            lambda: _AVERAGE[dims](
                window.kernel, window.stride, window.before, window.ceil, with_padding
            ),
            x,
        )
    if dims == 1:
        raise node.refusal(f"pads={[*window.before, *window.after]} in one dimension")
    # Sums over whole windows, divided by what each has to count.
    if math.prod(x.size(2 + d) + window.before[d] + window.after[d] for d in range(dims)) > 2**24:
        raise node.refusal(f"pads={[*window.before, *window.after]} of so large a tensor")
    counted = torch.ones(1, 1, *(x.size(2 + dim) for dim in range(dims)))
    if with_padding:
        counted = F.pad(counted, window.sides(), value=1.0)
    beyond = _whole_windows(window, x)
    left = [a - b for a, b in zip(beyond, window.sides(), strict=True)] if with_padding else beyond
    count = _SUM[dims](F.pad(counted, left), window.kernel, window.stride, divisor_override=1)
    padded = reader.call(F.pad, x, tuple(beyond))
    sums = reader.call(
        _SUM[dims], padded, window.kernel, window.stride, 0, False, True, divisor_override=1
    )
    dtype = torch.empty(0, dtype=x.metas[0].dtype).numpy().dtype
    counts = reader.constant("counts", count.numpy().astype(dtype))
    return reader.call(operator.truediv, sums, counts)


def _as_torch(window: Window) -> bool:
    """Whether torch's layer takes the padding."""
    sides = zip(window.before, window.kernel, strict=True)
    return window.is_symmetric and all(side <= size // 2 for side, size in sides)


def _as_torch_rounding_up(window: Window, x: Computed) -> bool:
    """Whether torch's max-pool with ceil_mode places the windows that padding behind alone, as
    TensorFlow's "same" has it, asks for."""
    sides = zip(window.before, window.kernel, strict=True)
    if window.is_symmetric or any(side > size // 2 for side, size in sides):
        return False
    for dim in range(len(window.kernel)):
        size, before, stride = x.size(2 + dim), window.before[dim], window.stride[dim]
        room = size + 2 * before - window.reach(dim)
        count = -(-room // stride) + 1
        if (count - 1) * stride >= size + before:
            count -= 1
        if room < 0 or count != _count(window, x, dim):
            return False
    return True


def _count(window: Window, x: Computed, dim: int) -> int:
    """How many windows ONNX places. The last one starts in front of the padding at the end."""
    size, stride = x.size(2 + dim), window.stride[dim]
    room = size + window.before[dim] + window.after[dim] - window.reach(dim)
    if room < 0:
        raise ValueError(f"a window of {window.reach(dim)} over {size} pixels")
    count = (-(-room // stride) if window.ceil else room // stride) + 1
    if window.ceil and (count - 1) * stride >= size + window.before[dim]:
        count -= 1
    return count


def _whole_windows(window: Window, x: Computed) -> list[int]:
    """The sides to pad so that exactly the windows fit that ONNX places."""
    sides = []
    for dim in reversed(range(len(window.kernel))):
        size, before = x.size(2 + dim), window.before[dim]
        last = (_count(window, x, dim) - 1) * window.stride[dim]
        sides += [before, last + window.reach(dim) - size - before]
    return sides


def _window(node: OnnxNode, x: Computed) -> Window:
    kernel = node.ints("kernel_shape")
    if not kernel:
        raise node.refusal("a pool without kernel_shape")
    return window_of(node, x, tuple(kernel))


def _global(layers: Layers) -> Callable[..., Computed]:
    def read(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
        x = reader.computed(x)
        if x.rank not in layers:
            raise node.refusal(f"a tensor of {x.rank} dimensions")
        return reader.layer(node, lambda: layers[x.rank](1), x)

    return read


POOLS: Operators = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global(_GLOBAL_AVERAGE),
    "GlobalMaxPool": _global(_GLOBAL_MAX),
}
