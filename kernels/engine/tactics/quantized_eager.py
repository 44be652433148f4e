"""Computes nodes on quantised values by the plain-torch twins of the native kernels: the reference
for those, and the fallback where there are none. Values on a GPU, int8 (the same less 128), become
uint8 for a twin, and its result int8 again.
"""

from collections.abc import Callable, Hashable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.kernels.cpu.conv_candidates import refusal
from resfuse.kernels.cpu.library import why_unavailable
from resfuse.kernels.engine.ir.folded_weights import conv_weights, scale_and_shift, slope_of
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Convert,
    MaxPool,
    Mean,
    Node,
    Pick,
    State,
    Value,
)
from resfuse.kernels.ops.quantization import (
    Quantization,
    Requantization,
    affine_ref,
    average_pool_ref,
    conv_ref,
    dequantize,
    less_128,
    max_pool_ref,
    mean_ref,
    plus_128,
    quantize,
    quantize_weights,
    requantization,
)

Function = Callable[..., Tensor]
Keep = Callable[[Hashable, Callable[[], list[Tensor]]], list[Tensor]]  # as Arena.tensors


def is_quantized(node: Node, values: dict[str, Value]) -> bool:
    """Returns whether a node reads or computes quantised values."""
    return any(values[name].quantization is not None for name in (*node.inputs, node.name))


def has_native_twin(op: Conv, x: Value) -> bool:
    """Returns whether native steps compute a convolution of quantised values x here."""
    quantized = op.problem.is_quantized and x.dtype == torch.uint8
    return quantized and why_unavailable("u8") is None and refusal(op.problem) is None


def function_of(node: Node, values: dict[str, Value], state: State, keep: Keep) -> Function | None:
    """Returns a node on quantised values as a function of its inputs; None for one of torch's,
    which moves them like any others.

    Args:
        keep: stores the quantised weights for all nodes that share them.
    """
    function = _on_u8(node, values, state, keep)
    if function is None or isinstance(node.op, Concat):
        return function
    if all(values[name].dtype != torch.int8 for name in (*node.inputs, node.name)):
        return function
    return lambda *inputs: _as_s8(function(*map(_as_u8, inputs)))


def _as_u8(x: Tensor) -> Tensor:
    return plus_128(x) if x.dtype == torch.int8 else x


def _as_s8(x: Tensor) -> Tensor:
    return less_128(x) if x.dtype == torch.uint8 else x


def _on_u8(node: Node, values: dict[str, Value], state: State, keep: Keep) -> Function | None:
    op, output = node.op, values[node.name].quantization
    x = values[node.inputs[0]].quantization
    if isinstance(op, Convert):
        return _convert(x, output)
    if isinstance(op, Pick):
        return _pick(op, x)
    if isinstance(op, Concat):
        return lambda *parts: torch.cat(parts, 1)  # they share a scale
    if isinstance(op, MaxPool):
        return partial(
            max_pool_ref, kernel=op.kernel, stride=op.stride, padding=op.padding,
            dilation=op.dilation, ceil=op.ceil, after=op.padding_after,
        )  # fmt: skip
    if not isinstance(op, Conv | Affine | Mean | AveragePool):
        return None
    assert x is not None
    if isinstance(op, Conv):
        return _conv(node, op, values, state, keep)
    if isinstance(op, Affine):
        return _affine(node, op, values, state, keep)
    if isinstance(op, Mean):
        shape = values[node.name].shape
        return lambda given: mean_ref(given, x, output).view(shape)
    assert output is not None
    divisors = OnDevice(divisors_of(op, values[node.inputs[0]].shape))
    return lambda given: average_pool_ref(
        given, x, output, op.kernel, op.stride, op.padding, divisors(given.device)
    )


def quantized_weights(op: Conv, state: State, x: Quantization) -> tuple[Tensor, Requantization]:
    """Returns the weight [K, C / groups, R, S] of a convolution in int8, with its norm folded in,
    and what turns its sums into real numbers, with its correction in the bias."""
    weight, bias = conv_weights(op, state, torch.float64)
    if op.correction is not None:
        bias = bias + state[op.correction]
    narrow, scale = quantize_weights(weight)
    return narrow, requantization(narrow, scale, bias, x)


def _convert(x: Quantization | None, output: Quantization | None) -> Function:
    if output is not None:
        return lambda given: quantize(given, output)
    assert x is not None
    return lambda given: dequantize(given, x)


class OnDevice:
    """A constant tensor on whichever device it is asked for; kept there, since a CUDA graph may
    copy nothing from the CPU."""

    def __init__(self, on_cpu: Tensor) -> None:
        self._known = {on_cpu.device: on_cpu}
        self._on_cpu = on_cpu

    def __call__(self, device: torch.device) -> Tensor:
        if device not in self._known:
            self._known[device] = self._on_cpu.to(device)
        return self._known[device]


def _conv(node: Node, op: Conv, values: dict[str, Value], state: State, keep: Keep) -> Function:
    problem, shape = op.problem, values[node.name].shape
    x, output = values[node.inputs[0]].quantization, values[node.name].quantization
    added = None if node.residual is None else values[node.residual].quantization
    assert x is not None
    folded = op.weight, op.bias, op.norm, op.correction, problem.c, problem.r, problem.groups
    weight, *rest = keep(
        ("int8", x, *folded),
        lambda: [t for part in [quantized_weights(op, state, x)] for t in (part[0], *part[1])],
    )
    how = Requantization(*rest)
    slope = slope_of(op, state)

    def run(given: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            residual = residual.reshape(problem.output_shape)
        y = conv_ref(
            given.reshape(problem.input_shape), weight, how, x, output, problem.geometry,
            op.activation, slope, residual, added, op.residual_last,
        )  # fmt: skip
        return y.reshape(shape)

    return run


def _affine(node: Node, op: Affine, values: dict[str, Value], state: State, keep: Keep) -> Function:
    channels, around = values[node.name].shape[1], (1, -1, 1, 1)[: len(values[node.name].shape)]
    x, output = values[node.inputs[0]].quantization, values[node.name].quantization
    added = None if node.residual is None else values[node.residual].quantization
    slope = slope_of(op, state)
    assert x is not None
    ends = output, op.activation, slope
    if op.gate:
        factor = values[node.inputs[1]].quantization
        assert factor is not None
        nothing = torch.zeros((), device="cpu")
        return lambda given, gate, residual=None: affine_ref(
            given, dequantize(gate, factor), nothing, x, *ends, residual, added, op.residual_last
        )
    if op.norm is None:
        scale, shift = torch.ones((), device="cpu"), torch.zeros((), device="cpu")  # for any device
    else:
        both = keep(("int8", op.norm, channels), lambda: list(scale_and_shift(op, channels, state)))
        scale, shift = (t.view(around) for t in both)
    return lambda given, residual=None: affine_ref(
        given, scale, shift, x, *ends, residual, added, op.residual_last
    )


def _pick(op: Pick, x: Quantization | None) -> Function:
    """Returns a function that picks channels and pixels; what is zero is of zero points."""
    picked = {2: op.rows, 3: op.columns} | ({} if op.channels is None else {1: op.channels})
    indices = {dim: OnDevice(torch.tensor(at, device="cpu")) for dim, at in picked.items()}

    def run(given: Tensor) -> Tensor:
        y = given
        for dim, index in indices.items():
            y = y.index_select(dim, index(given.device))
        if op.zeros or any(op.around):
            y = F.pad(y, (*op.around, 0, op.zeros), value=x.zero_point if x is not None else 0)
        return y.contiguous(memory_format=torch.channels_last)

    return run


def divisors_of(op: AveragePool, shape: tuple[int, ...]) -> Tensor:
    """Returns the divisor of each window [P, Q]: the values that torch's own pool counts in it."""
    ones = torch.ones(1, 1, *shape[2:], dtype=torch.float64, device="cpu")
    window = op.kernel, op.stride, op.padding, op.ceil
    sums = F.avg_pool2d(ones, *window, True, 1)
    means = F.avg_pool2d(ones, *window, op.count_padding, op.divisor)
    return (sums / means)[0, 0].round().float()
