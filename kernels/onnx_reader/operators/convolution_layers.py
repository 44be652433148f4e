"""Conv and ConvTranspose: torch's layers, with a padding before them where it is lopsided."""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import nn

from resfuse.kernels.onnx_reader.operators.windows import Window, window_of
from resfuse.kernels.onnx_reader.reading.node import OnnxNode, Operators
from resfuse.kernels.onnx_reader.reading.values import Computed, Constant, Value

if TYPE_CHECKING:
    from resfuse.kernels.onnx_reader.reading.graph_reader import Reader

_CONVS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Callable[..., nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


def weight_of(node: OnnxNode, value: Value | None, what: str) -> np.ndarray:
    if not isinstance(value, Constant):
        raise node.refusal(f"{what} that is computed while the network runs")
    return value.array


def _conv(reader: "Reader", node: OnnxNode, x: Value, w: Value, b: Value | None = None) -> Computed:
    x = reader.computed(x)
    weight = weight_of(node, w, "a weight")
    bias = None if b is None else weight_of(node, b, "a bias")
    window, groups = _window(node, x, weight), node.attribute("group", 1)
    if weight.shape[1] * groups != x.size(1):
        raise node.refusal(
            f"a weight of {list(weight.shape)} in {groups} groups over {x.size(1)} channels"
        )
    padding = window.before
    if not window.is_symmetric:
        x = reader.call(F.pad, x, tuple(window.sides()))
        padding = (0,) * len(padding)
    return reader.layer(
        node,
        lambda: _CONVS[weight.ndim - 2](
            x.size(1), weight.shape[0], window.kernel, window.stride, padding, window.dilation,
            groups, bias=bias is not None,
        ),
        x, weight=weight, bias=bias,
    )  # fmt: skip


def _conv_transpose(
    reader: "Reader", node: OnnxNode, x: Value, w: Value, b: Value | None = None
) -> Computed:
    x = reader.computed(x)
    weight = weight_of(node, w, "a weight")
    bias = None if b is None else weight_of(node, b, "a bias")
    groups, dims = node.attribute("group", 1), weight.ndim - 2
    extra = node.ints("output_padding", [0] * dims)
    sizes = node.ints("output_shape")
    auto = node.attribute("auto_pad", "NOTSET")
    if (auto != "NOTSET" or sizes is not None) and auto != "VALID":
        window = _transposed_window(node, x, weight, extra, sizes, auto)
    else:
        window = _window(node, x, weight)
    if len(extra) != dims or min(extra) < 0 or weight.shape[0] != x.size(1):
        raise node.refusal(f"output_padding={extra} with a weight of {list(weight.shape)}")
    padding, output_padding, cut = _as_torch(window, extra)
    y = reader.layer(
        node,
        lambda: _TRANSPOSED[dims](
            x.size(1), weight.shape[1] * groups, window.kernel, window.stride, padding,
            output_padding, groups, bias is not None, window.dilation,
        ),
        x, weight=weight, bias=bias,
    )  # fmt: skip
    if any(cut):
        whole = slice(None)
        ends = tuple(slice(None, -after if after else None) for after in cut)
        y = reader.call(operator.getitem, y, (whole, whole, *ends))
    return y


def _as_torch(
    window: Window, extra: list[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Padding, output padding, and what is cut off the end where torch knows no such padding.

    A larger padding at the end than in front is a cut; a smaller one is output padding.
    """
    padding, output_padding, cut = [], [], []
    for before, after, more, stride, dilation in zip(
        window.before, window.after, extra, window.stride, window.dilation, strict=True
    ):
        end = more + before - after  # what the result has beyond a symmetric padding's
        padding.append(before)
        output_padding.append(max(0, end))
        cut.append(max(0, -end))
        if end >= max(stride, dilation):
            raise ValueError(
                f"pads [{before}, {after}] with output_padding {more} at stride {stride} are not "
                "read"
            )
    return tuple(padding), tuple(output_padding), tuple(cut)


def _transposed_window(
    node: OnnxNode,
    x: Computed,
    weight: np.ndarray,
    extra: list[int],
    sizes: list[int] | None,
    auto: str,
) -> Window:
    """The window whose pads follow from the output's size."""
    node.attribute("pads")  # not heeded where the size is given
    dims = weight.ndim - 2
    node.require("kernel_shape", None, list(weight.shape[2:]))
    stride = tuple(node.ints("strides", [1] * dims))
    dilation = tuple(node.ints("dilations", [1] * dims))
    known = [x.size(2 + dim) for dim in range(dims)]
    if auto not in ("NOTSET", "SAME_UPPER", "SAME_LOWER"):
        raise node.refusal(f"auto_pad={auto!r}")
    if sizes is None:
        sizes = [size * s for size, s in zip(known, stride, strict=True)]
    sizes = sizes[-dims:]
    before, after = [], []
    for dim in range(dims):
        reach = dilation[dim] * (weight.shape[2 + dim] - 1) + 1
        total = stride[dim] * (known[dim] - 1) + extra[dim] + reach - sizes[dim]
        if total < 0:
            raise node.refusal(f"output_shape={sizes}")
        less, more = total // 2, total - total // 2
        # So says the standard; ONNX Runtime puts the odd pixel there, too.
        at_end = auto == "SAME_UPPER"
        before.append(less if at_end else more)
        after.append(more if at_end else less)
    return Window(tuple(weight.shape[2:]), stride, dilation, tuple(before), tuple(after))


def _window(node: OnnxNode, x: Computed, weight: np.ndarray) -> Window:
    kernel = tuple(weight.shape[2:])
    node.require("kernel_shape", None, list(kernel))
    return window_of(node, x, kernel)


CONVOLUTIONS: Operators = {"Conv": _conv, "ConvTranspose": _conv_transpose}
