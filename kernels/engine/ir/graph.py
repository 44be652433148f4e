"""Graph: a network as the engine sees it, plain data that can be saved as JSON.

Convolutions have taken in their batch norm, activation and sum. A linear layer is a convolution of
a 1x1 map, or of the whole map behind a flatten. Every other operation is a `Torch` call.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue
from resfuse.kernels.ops.quantization import Quantization

State = Mapping[str, Tensor]  # parameters, buffers and constants by name


@dataclass(frozen=True)
class Value:
    """The shape and dtype of a tensor between operations: [N, C, H, W], or any shape where only
    torch reads it. A quantised one is uint8, or on a GPU int8, the same less 128; `quantization`
    says what the numbers in uint8 stand for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Norm:
    """An inference batch norm, by the names of its tensors in the state; without mean and variance
    a layer scale: x times `weight` plus `bias`, either of which may be missing, and [C, 1, 1] and
    the like."""

    mean: str | None
    var: str | None
    weight: str | None
    bias: str | None
    eps: float


@dataclass(frozen=True)
class Conv:
    """y = act(norm(conv(x)) + residual), or act(norm(conv(x))) + residual."""

    problem: ConvProblem
    weight: str
    bias: str | None = None
    norm: Norm | None = None
    slope: str | float | None = None  # of leaky_relu, or where prelu's is in the state
    correction: str | None = None  # added to the bias: the mean error of quantised weights, [K]

    @property
    def residual_last(self) -> bool:
        return self.problem.epilogue.residual_last

    @property
    def activation(self) -> str:
        return self.problem.activation

    def with_activation(self, activation: str, slope: str | float | None) -> "Conv":
        """Returns a copy fused with the activation after it."""
        epilogue = self.problem.epilogue._replace(activation=activation)
        return replace(self, problem=replace(self.problem, epilogue=epilogue), slope=slope)

    def with_residual(self) -> "Conv":
        """Returns a copy fused with a residual, added after the activation if there is one."""
        last = self.activation != "identity"
        epilogue = Epilogue.of(self.activation, residual=True, residual_last=last)
        return replace(self, problem=replace(self.problem, epilogue=epilogue))


@dataclass(frozen=True)
class Affine:
    """y = act(norm(x) + residual), where no convolution could take it in.

    With a gate, x is multiplied by the second input [N, C, 1, 1], and there is no norm.
    """

    norm: Norm | None = None
    activation: str = "identity"
    slope: str | float | None = None
    residual: bool = False
    residual_last: bool = False
    gate: bool = False

    def with_activation(self, activation: str, slope: str | float | None) -> "Affine":
        """Returns a copy fused with the activation after it."""
        return replace(self, activation=activation, slope=slope)

    def with_residual(self) -> "Affine":
        """Returns a copy fused with a residual, added after the activation if there is one."""
        return replace(self, residual=True, residual_last=self.activation != "identity")


@dataclass(frozen=True)
class MaxPool:
    """The largest value of each window; values beyond the edge do not count."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil: bool = False  # whether a last window may reach beyond the far edge
    padding_after: tuple[int, int] | None = None  # below and on the right; None: as `padding`


@dataclass(frozen=True)
class AveragePool:
    """The mean of each window. Zeros of the padding count as values if `count_padding`."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil: bool = False
    count_padding: bool = True
    divisor: int | None = None  # instead of the number of values


@dataclass(frozen=True)
class Pick:
    """y[:, k, p, q] = x[:, channels[k], rows[p], columns[q]], followed by channels of zeros, and
    with pixels of zeros around it: nearest upsampling, a crop, padding, a ResNet's shortcut without
    parameters, a split, a channel shuffle."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    zeros: int = 0  # channels behind those of x
    channels: tuple[int, ...] | None = None  # None: all, in order
    around: tuple[int, int, int, int] = (0, 0, 0, 0)  # zeros on the left, right, top and bottom

    @property
    def scatters(self) -> bool:
        """Whether it picks channels that are not one after another."""
        picked = self.channels or ()
        return any(after != before + 1 for before, after in pairwise(picked))

    def then(self, other: "Pick") -> "Pick | None":
        """Returns one Pick that equals `other` applied to this one's result, None where there is
        none."""
        left, right, top, bottom = self.around
        rows = _picked_of((-1,) * top + self.rows + (-1,) * bottom, other.rows)
        columns = _picked_of((-1,) * left + self.columns + (-1,) * right, other.columns)
        if rows is None or columns is None:
            return None
        channels = self.channels
        if other.channels is not None:
            if self.zeros:  # which may be among the channels that the other one picks
                return None
            own = channels
            channels = other.channels if own is None else tuple(own[k] for k in other.channels)
        zeros = (*columns[1:], *rows[1:])
        left, right, top, bottom = (a + b for a, b in zip(zeros, other.around, strict=True))
        around = left, right, top, bottom
        return Pick(rows[0], columns[0], self.zeros + other.zeros, channels, around)


def _picked_of(
    given: tuple[int, ...], at: tuple[int, ...]
) -> tuple[tuple[int, ...], int, int] | None:
    """Returns what `at` picks of `given`, where -1 stands for zeros, without the zeros at its ends,
    and how many those are at either; None if it has others, or nothing else."""
    found = tuple(given[i] for i in at)
    inner = tuple(i for i in found if i >= 0)
    before = next((n for n, i in enumerate(found) if i >= 0), 0)
    if not inner or found[before : before + len(inner)] != inner:
        return None
    return inner, before, len(found) - before - len(inner)


@dataclass(frozen=True)
class Mean:
    """The mean of each channel over its map."""


@dataclass(frozen=True)
class Concat:
    """The channels of all inputs one after another."""


@dataclass(frozen=True)
class Convert:
    """The same values in another dtype, rounded to the nearest."""

    dtype: str  # float32, bfloat16, or for quantised values uint8, on a GPU int8


@dataclass(frozen=True)
class LayerNorm:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, over the channels of each pixel."""

    weight: str | None
    bias: str | None
    eps: float


@dataclass(frozen=True)
class GroupNorm:
    """y = act((x - mean) / sqrt(variance + eps) * weight + bias + residual), the mean and variance
    over the pixels and channels of each of `groups` groups of an image."""

    groups: int
    weight: str | None
    bias: str | None
    eps: float
    activation: str = "identity"
    slope: str | float | None = None
    residual: bool = False
    residual_last: bool = False

    def with_activation(self, activation: str, slope: str | float | None) -> "GroupNorm":
        """Returns a copy fused with the activation after it."""
        return replace(self, activation=activation, slope=slope)

    def with_residual(self) -> "GroupNorm":
        """Returns a copy fused with a residual, added after the activation if there is one."""
        return replace(self, residual=True, residual_last=self.activation != "identity")


@dataclass(frozen=True)
class SplitSum:
    """y[:, k] = the sum over r of x[:, r * K + k], for K channels of each of `radix` splits.

    With a gate, x is multiplied by the second input [N, radix * K, 1, 1] first: split attention.
    """

    radix: int
    gate: bool = False


@dataclass(frozen=True)
class SplitSoftmax:
    """The softmax over r of x[:, r * K + k], for K channels of each of `radix` splits."""

    radix: int


@dataclass(frozen=True)
class Torch:
    """An operation that torch runs.

    In `args` and `kwargs`, {"value": i} stands for the node's input i, {"state": name} for a tensor
    of the state.
    """

    target: str  # "aten.sigmoid.default"
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    result: int | None = None  # of an operation with several results, the one that is used


Operation = (
    Conv
    | Affine
    | MaxPool
    | AveragePool
    | Pick
    | Mean
    | Concat
    | Convert
    | LayerNorm
    | GroupNorm
    | SplitSum
    | SplitSoftmax
    | Torch
)
Finished = Conv | Affine | GroupNorm  # those that end with an activation, and may add a residual


@dataclass(frozen=True)
class Node:
    """An operation on values; a residual is the last input of one that adds it."""

    name: str  # of the node and of its output
    op: Operation
    inputs: tuple[str, ...]

    @property
    def residual(self) -> str | None:
        """Returns the name of the value that is added, None without one."""
        op = self.op
        adds = op.problem.residual if isinstance(op, Conv) else getattr(op, "residual", False)
        return self.inputs[-1] if adds else None

    @property
    def inplace_input(self) -> str | None:
        """Returns the name of the input that the output may overwrite if no later node reads it."""
        if isinstance(self.op, Affine | LayerNorm | GroupNorm) and self.residual is None:
            return self.inputs[0]
        return self.residual


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can run."""

    input: str  # "" where the graph has no input
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    values: dict[str, Value]
    spec: str = ""  # the containers of the model's result (torch.utils._pytree, as JSON)
    constants: tuple[str, ...] = ()  # names of the state that are not in the model's state_dict
    layout: tuple[int, ...] | None = None  # strides and offset that inputs must have, if any
    derived: tuple[Node, ...] = ()  # make names of the state from others: derived_state.py
    dead_inputs: frozenset[str] = frozenset()  # of `reads`, those that are not read afterwards
    device: torch.device | None = field(default=None, compare=False)  # where it was captured

    @cached_property
    def readers(self) -> Counter[str]:
        """Returns how often each value is read, by nodes and as an output."""
        return Counter([name for node in self.nodes for name in node.inputs] + list(self.outputs))

    @cached_property
    def last_read(self) -> dict[str, int]:
        """Returns, for each value, the position of the last node that reads it."""
        last = {name: at for at, node in enumerate(self.nodes) for name in node.inputs}
        return last | dict.fromkeys(self.outputs, len(self.nodes))

    @property
    def batch_size(self) -> int:
        return self.values[self.input].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype that most is computed in: the narrowest of the values'."""
        found = [self.values[node.name] for node in self.nodes]
        found = [value for value in found if is_computed(value)]
        dtypes = (value.dtype for value in found)
        return min(dtypes, key=lambda dtype: dtype.itemsize, default=self.given_dtype)

    @property
    def given_dtype(self) -> torch.dtype:
        """Returns the dtype of the numbers that the input stands for: float32 for pixels, for
        integers, and where a part has no input."""
        value = self.values.get(self.input)
        return value.dtype if value and value.dtype.is_floating_point else torch.float32

    def part(self, start: int, stop: int) -> "Graph":
        """Returns nodes [start, stop) as a graph. Values from outside are its `reads`, and dead
        inputs among them those that this graph computes and no later node reads."""
        nodes = self.nodes[start:stop]
        computed = {node.name for node in nodes}
        read_later = {name for node in self.nodes[stop:] for name in node.inputs}
        read_later.update(self.outputs)
        outputs = tuple(node.name for node in nodes if node.name in read_later)
        reads = dict.fromkeys(
            name for node in nodes for name in node.inputs if name not in computed
        )
        names = [*reads, *computed]
        live = {*read_later, *self.reads} - self.dead_inputs
        return Graph(
            next(iter(reads), ""),
            outputs,
            nodes,
            {name: self.values[name] for name in names},
            dead_inputs=frozenset(reads) - live,
            device=self.device,
        )

    def inner(self, start: int, stop: int) -> set[str]:
        """Returns the values that nodes [start, stop) compute and no other node reads."""
        nodes = self.nodes[start:stop]
        here = Counter(name for node in nodes for name in node.inputs)
        return {n.name for n in nodes if n.name in here and self.readers[n.name] == here[n.name]}

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Returns the values that no node computes."""
        computed = {node.name for node in self.nodes}
        used = [name for node in self.nodes for name in node.inputs if name not in computed]
        return tuple(dict.fromkeys([*filter(None, [self.input]), *used]))


def is_computed(value: Value) -> bool:
    """Returns whether a value holds real numbers: floats, or quantised ones."""
    return value.dtype.is_floating_point or value.quantization is not None
