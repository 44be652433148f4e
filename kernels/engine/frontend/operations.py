"""Translates ATen operations into the graph's own, where the graph has one for them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from resfuse.kernels.engine.frontend.call_arguments import arguments, keeps, with_defaults
from resfuse.kernels.engine.frontend.channels_last import (
    add_layer_norm,
    add_permute,
    factor_of_channels,
    repeated,
)
from resfuse.kernels.engine.frontend.decomposed_batch_norm import spelled_norm
from resfuse.kernels.engine.frontend.graph_builder import Captured
from resfuse.kernels.engine.frontend.map_norms import (
    add_batch_norm,
    add_group_norm,
    add_instance_norm,
)
from resfuse.kernels.engine.frontend.split_attention import (
    add_gated_splits,
    add_split_softmax,
    add_split_sum,
    add_stack,
    add_view,
)
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    MaxPool,
    Mean,
    Node,
    Norm,
    Pick,
)
from resfuse.kernels.ops.conv_problem import (
    ConvProblem,
    Epilogue,
    Geometry,
    dtypes_of,
    math_mode_of,
)

aten = torch.ops.aten

# operation -> our name
_ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.sigmoid.default: "sigmoid",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.leaky_relu.default: "leaky_relu",
    aten.hardtanh.default: "relu6",
    aten.relu6.default: "relu6",
    aten.prelu.default: "prelu",
    aten._prelu_kernel.default: "prelu",
    aten.gelu.default: "gelu",
}
SAME_VALUES = (
    aten.dropout.default, aten.clone.default, aten.contiguous.default, aten.alias.default,
)  # fmt: skip
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def _conv(read: Captured, node: fx.Node) -> bool:
    x, w, b, stride, padding, dilation, groups = with_defaults(
        node, (None, [1, 1], [0, 0], [1, 1], 1)
    )
    weight, bias = read.state_of(w), read.state_of(b)
    if weight is None or (b is not None and bias is None) or not read.is_map(x):
        return False
    n, c, h, width = x.meta["val"].shape
    k, _, r, s = w.meta["val"].shape
    geometry = Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)
    dtypes = dtypes_of(math_mode_of(x.meta["val"].dtype, x.meta["val"].device))
    problem = ConvProblem(n, c, h, width, k, r, s, geometry, Epilogue(), dtypes)
    read.add(node, Conv(problem, weight, bias), x)
    return True


def _linear(read: Captured, node: fx.Node) -> bool:
    x, w, b = with_defaults(node, (None,))
    weight, bias = read.state_of(w), read.state_of(b)
    if weight is None or (b is not None and bias is None):
        return False
    if len(w.meta["val"].shape) != 2:
        return False
    map_of: Any = x
    if read.is_pixels(x):
        n, h, width, c = x.meta["val"].shape
        r = s = 1
    else:  # over the last of more dimensions it is no convolution of [N, C, H, W] (Swin's windows)
        map_of = _flattened(x) if len(x.meta["val"].shape) == 2 else None
        if not read.is_map(map_of):
            return False
        n, c, h, width = (*map_of.meta["val"].shape, 1, 1)[:4]
        r, s = h, width
    k = w.meta["val"].shape[0]
    dtypes = dtypes_of(math_mode_of(map_of.meta["val"].dtype, map_of.meta["val"].device))
    problem = ConvProblem(n, c, h, width, k, r, s, Geometry(), Epilogue(), dtypes)
    add = read.add_pixelwise if map_of is x else read.add  # a flattened map is read whole
    add(node, Conv(problem, weight, bias), map_of)
    return True


def _activation(read: Captured, node: fx.Node) -> bool:
    x, *rest = arguments(node)
    name = _ACTIVATIONS[node.target]
    if not (read.is_pixels(x) and name != "prelu") and not read.is_map(x):
        return False
    if name == "gelu" and (node.kwargs.get("approximate") or [*rest, "none"][0]) == "tanh":
        name = "gelu_tanh"
    slope: str | float | None = None
    if node.target is aten.hardtanh.default and [float(limit) for limit in rest] != [0, 6]:
        return False
    if name == "leaky_relu":
        slope = float(rest[0]) if rest else 0.01
    if name == "prelu":
        slope = read.state_of(_reshaped(rest[0]))
        if slope is None or read.state[slope].numel() != x.meta["val"].shape[1]:
            return False
    add = read.add if name == "prelu" else read.add_pixelwise  # its channels are dimension 1
    add(node, Affine(None, name, slope), x)
    return True


def _sum(read: Captured, node: fx.Node) -> bool:
    if (spelled := spelled_norm(node, read.state_of)) is not None and read.is_map(spelled[0]):
        x, norm = spelled
        read.add(node, Affine(norm), x)
        return True
    a, b = arguments(node)
    if _shifted(read, node, a, b) or _shifted(read, node, b, a):
        return True
    both = all(map(read.is_pixels, (a, b))) or all(map(read.is_map, (a, b)))
    if not both or node.kwargs:
        return False
    if a.meta["val"].shape != b.meta["val"].shape or a.meta["val"].dtype != b.meta["val"].dtype:
        return False
    read.add_pixelwise(node, Affine(residual=True), a, b)
    return True


def _difference(read: Captured, node: fx.Node) -> bool:
    """Adds a - b as a sum of a and b times -1, which is exact."""
    a, b = arguments(node)
    if isinstance(b, int | float) and _shifted(read, node, a, -b):
        return True
    both = all(map(read.is_pixels, (a, b))) or all(map(read.is_map, (a, b)))
    if not both or not keeps(read, node, a) or not keeps(read, node, b):
        return False
    if not (read.is_ours(a) or read.is_ours(b)):
        return False
    pixels, of_b = all(map(read.is_pixels, (a, b))), b.meta["val"]
    names = read.pixels if pixels else read.names
    minus = repeated(read, -1.0, of_b.shape[-1 if pixels else 1], of_b.device)
    negated = Node(f"{node.name}:negated", Affine(Norm(None, None, minus, None, 0.0)), (names[b],))
    read.values[negated.name] = read.values[names[b]]
    read.nodes.append(negated)
    read.add_pixelwise(node, Affine(residual=True), a, b)
    read.nodes[-1] = replace(read.nodes[-1], inputs=(names[a], negated.name))
    return True


def _max_pool(read: Captured, node: fx.Node) -> bool:
    x, kernel, stride, padding, dilation, ceil = with_defaults(node, (None, [0, 0], [1, 1], False))
    if not read.is_map(x):
        return False
    op = MaxPool(
        _pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation), bool(ceil)
    )
    read.add(node, op, x)
    return True


def _average_pool(read: Captured, node: fx.Node) -> bool:
    x, kernel, stride, padding, ceil, count_padding, divisor = with_defaults(
        node, ([], [0, 0], False, True, None)
    )
    if not read.is_map(x) or len(x.meta["val"].shape) != 4:
        return False
    window = _pair(kernel), _pair(stride or kernel), _pair(padding)
    read.add(node, AveragePool(*window, bool(ceil), bool(count_padding), divisor), x)
    return True


def _nearest(read: Captured, node: fx.Node) -> bool:
    """Adds nearest upsampling as a Pick, whose pixels are found by upsampling their coordinates."""
    x, *how = arguments(node)
    if not read.is_map(x) or len(x.meta["val"].shape) != 4 or node.kwargs:
        return False
    h, w = x.meta["val"].shape[2:]
    rows = torch.arange(h, dtype=torch.float32, device="cpu")[:, None].expand(1, 1, h, w)
    columns = torch.arange(w, dtype=torch.float32, device="cpu").expand(1, 1, h, w)
    picked = node.target(rows, *how)[0, 0, :, 0], node.target(columns, *how)[0, 0, 0]  # type: ignore[operator]
    of_rows, of_columns = (tuple(map(int, each.tolist())) for each in picked)
    read.add(node, Pick(of_rows, of_columns), x)
    return True


def _slice(read: Captured, node: fx.Node) -> bool:
    """Adds a slice of channels, rows or columns as a Pick: a part, a crop, every second pixel."""
    x, dim, start, end, step = with_defaults(node, (0, None, None, 1))
    if not read.is_map(x) or len(x.meta["val"].shape) != 4:
        return False
    shape = x.meta["val"].shape
    picked = [tuple(range(size)) for size in shape]
    picked[dim] = picked[dim][start:end:step]
    if len(picked[dim]) == shape[dim]:
        read.same(node, x)
    elif dim % 4 == 0 or not picked[dim]:
        return False
    else:
        channels = picked[1] if dim % 4 == 1 else None
        read.add(node, Pick(picked[2], picked[3], channels=channels), x)
    return True


def _pad(read: Captured, node: fx.Node) -> bool:
    """Adds padding by channels of zeros behind those of a map as a Pick."""
    x, sides, mode, value = with_defaults(node, ("constant", None))
    if not read.is_map(x) or len(x.meta["val"].shape) != 4 or mode != "constant" or value:
        return False
    *others, zeros = sides
    if len(sides) != 6 or any(others) or zeros < 0:
        return False
    h, w = x.meta["val"].shape[2:]
    read.add(node, Pick(tuple(range(h)), tuple(range(w)), zeros), x)
    return True


def _product(read: Captured, node: fx.Node) -> bool:
    """Adds maps times one number a channel: as a norm where it is a parameter (layer scale), as a
    gate where it is computed (squeeze-and-excitation, of splits too)."""
    for x, gate in (arguments(node), arguments(node)[::-1]):
        if _scaled(read, node, x, gate) or add_gated_splits(read, node, x, gate):
            return True
        gate = _unexpanded(gate)
        if not (read.is_map(x) and read.is_map(gate)) or node.kwargs:
            continue
        of_x, of_gate = x.meta["val"], gate.meta["val"]
        fits = of_x.dim() == 4 and of_gate.shape == (*of_x.shape[:2], 1, 1)
        if fits and of_x.dtype == of_gate.dtype and x is not gate:
            read.add(node, Affine(gate=True), x, gate)
            return True
    return False


def _scaled(read: Captured, node: fx.Node, x: Any, factor: Any) -> bool:
    """Adds maps, or pixels, times one number of the state for each channel as a norm."""
    if not keeps(read, node, x) or x.target is aten.clamp.default:  # a quantised file's rounding
        return False
    scale = factor_of_channels(read, x, factor)
    if scale is None:
        return False
    read.add_pixelwise(node, Affine(Norm(None, None, scale, None, 0.0)), x)
    return True


def _shifted(read: Captured, node: fx.Node, x: Any, shift: Any) -> bool:
    """Adds maps, or pixels, plus one number of the state for each channel as a norm."""
    if not keeps(read, node, x):
        return False
    name = factor_of_channels(read, x, shift)
    if name is None:
        return False
    read.add_pixelwise(node, Affine(Norm(None, None, None, name, 0.0)), x)
    return True


def _mean(read: Captured, node: fx.Node) -> bool:
    x, *rest = arguments(node)
    if not read.is_map(x) or len(x.meta["val"].shape) != 4:
        return False
    if node.target is aten.mean.dim:
        if sorted(d % 4 for d in rest[0]) != [2, 3] or node.kwargs:
            return False
    elif tuple(x.meta["val"].shape[2:]) == _pair(rest[0]):
        read.same(node, x)
        return True
    elif _pair(rest[0]) != (1, 1):
        return _adaptive_pool(read, node, x, _pair(rest[0]))
    read.add(node, Mean(), x)
    return True


def _adaptive_pool(read: Captured, node: fx.Node, x: fx.Node, to: tuple[int, int]) -> bool:
    """Adds adaptive pooling to `to` windows as an AveragePool, where all windows are equal."""
    h, w = x.meta["val"].shape[2:]
    if h % to[0] or w % to[1]:
        return False
    window = h // to[0], w // to[1]
    read.add(node, AveragePool(window, window, (0, 0)), x)
    return True


def _concat(read: Captured, node: fx.Node) -> bool:
    parts, dim = with_defaults(node, (0,))
    if dim not in (1, -3) or not all(read.is_map(part) for part in parts):
        return False
    read.add(node, Concat(), *parts)
    return True


# ATen's operation -> a function that adds it and returns True, or returns False: it stays torch's
OPERATIONS: dict[Any, Callable[[Captured, fx.Node], bool]] = {
    aten.conv2d.default: _conv,
    aten.linear.default: _linear,
    aten._native_batch_norm_legit_no_training.default: add_batch_norm,
    aten.group_norm.default: add_group_norm,
    aten.instance_norm.default: add_instance_norm,
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _difference,
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _average_pool,
    aten.upsample_nearest2d.vec: _nearest,
    aten.upsample_nearest2d.default: _nearest,
    aten.slice.Tensor: _slice,
    aten.pad.default: _pad,
    **dict.fromkeys(RESHAPES, add_view),
    aten.permute.default: add_permute,
    aten.layer_norm.default: add_layer_norm,
    aten.mul.Tensor: _product,
    aten.adaptive_avg_pool2d.default: _mean,
    aten.mean.dim: _mean,
    aten.cat.default: _concat,
    aten.stack.default: add_stack,
    aten.sum.dim_IntList: add_split_sum,
    aten.softmax.int: add_split_softmax,
    **dict.fromkeys(_ACTIVATIONS, _activation),
}


def _pair(given: Any) -> tuple[int, int]:
    first, *second = given if isinstance(given, list | tuple) else [given]
    return int(first), int(second[0] if second else first)


def _reshaped(arg: Any) -> Any:
    """Returns the argument that `arg` is a reshape of, or `arg` itself."""
    while isinstance(arg, fx.Node) and arg.target in RESHAPES:
        arg = arg.args[0]
    return arg


def _unexpanded(arg: Any) -> Any:
    """Returns the argument that `arg` expands, or `arg` itself."""
    while isinstance(arg, fx.Node) and arg.target in (aten.expand.default, *SAME_VALUES):
        arg = arg.args[0]
    return arg


def _flattened(arg: Any) -> Any:
    """Returns the map [N, C, H, W] that `arg` [N, C * H * W] is a view of, or `arg` itself."""
    source = _reshaped(arg)
    while isinstance(source, fx.Node) and source.target in SAME_VALUES:
        source = _reshaped(source.args[0])
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    shape = source.meta["val"].shape
    flat = (shape[0], shape[1:].numel())
    return source if len(shape) == 4 and tuple(arg.meta["val"].shape) == flat else arg
