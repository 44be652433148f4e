"""Gives what leaves a fused module the strides that eager's layers would have given it.

Steps compute in NHWC, and between steps values stay in NHWC. In eager mode, on a CPU and on a GPU,
a convolution's result is dense, and channels_last where its input or its weight is. Batch norm,
activations, pools and sums keep that, but for shapes that are both (one channel, one pixel). A
forward is compiled for two formats of its inputs:

- contiguous: inputs and weights are, so eager's results are, too. What a step makes in NHWC is
  "flexible": it is put as eager has it where something reads it that may ask, and where it leaves.
  Steps, pools, activations, sums and fused children do not ask.
- any: every step gives its result the strides that eager gives it ("eager"). With channels_last
  tensors the result has them as it is made, so nothing is copied.

A value is "contiguous" (the input of a contiguous forward), "flexible", or "eager": in
TorchInductor's words, a layout is fixed or flexible.
"""

import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.kernels.fusion.tracing.module_tracing import has_hooks

InputFormat = Literal["contiguous", "any", "exported"]
Kind = Literal["contiguous", "flexible", "eager"]

_LAYOUT_PRESERVING_MODULES = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU,
    nn.LeakyReLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_LAYOUT_PRESERVING_CALLS = (
    F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.silu, F.gelu, F.hardswish, F.leaky_relu,
    F.avg_pool2d, F.adaptive_avg_pool2d, torch.sigmoid, operator.add, operator.mul, operator.iadd,
    operator.imul, torch.add, torch.mul, torch.cat, "relu", "relu_", "sigmoid", "add", "add_",
    "mul", "mul_",
)  # fmt: skip


def strides_in(shape: torch.Size | tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """Returns the strides of a dense [N, C, H, W] in a memory format, as torch.empty sets them."""
    _, c, h, w = shape
    if channels_last:
        return (max(c, 1) * max(h, 1) * max(w, 1), 1, max(c, 1) * max(w, 1), max(c, 1))
    return (max(c, 1) * max(h, 1) * max(w, 1), max(h, 1) * max(w, 1), max(w, 1), 1)


def suggests_channels_last(x: Tensor) -> bool:
    """Returns what c10's suggest_memory_format returns for a tensor, by which layers choose a
    format."""
    if x.dim() != 4:
        return False
    strides, least = x.stride(), 0
    if strides[1] == 0:
        return False
    for dim in (1, 3, 2, 0):
        if x.shape[dim] == 0 or strides[dim] < least:
            return False
        if dim == 0 and least == strides[1]:
            return False
        least = strides[dim] * (x.shape[dim] if x.shape[dim] > 1 else 1)
    return True


def convolves_to_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Returns whether eager's convolution of x by `weight` is channels_last."""
    if x.is_cuda and torch.float64 in (x.dtype, weight.dtype):  # cuDNN has no such convolution
        return False
    return suggests_channels_last(x) or suggests_channels_last(weight)


def laid_out(y: Tensor, channels_last: bool) -> Tensor:
    """Returns y [N, C, H, W] dense in a memory format, without a copy if it is already."""
    if y.dim() != 4 or y.numel() == 0:
        return y
    if torch.compiler.is_compiling():
        fmt = torch.channels_last if channels_last else torch.contiguous_format
        return y.contiguous(memory_format=fmt)
    strides = strides_in(y.shape, channels_last)
    if y.stride() == strides:
        return y
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    if y.is_contiguous(memory_format=fmt):  # but for the strides of sizes of one
        return y.as_strided(y.shape, strides)
    return torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device).copy_(y)


def is_ambiguous(shape: tuple[int, ...]) -> bool:
    """Returns whether tensors of a shape are contiguous and channels_last at once: eager's
    elementwise operations then make contiguous ones of them, unless they work in place."""
    return shape[1] == 1 or shape[2] == shape[3] == 1


def contiguous(y: Any) -> Any:
    """Gives flexible values, also those in lists and tuples, eager's contiguous strides."""
    if isinstance(y, Tensor):
        return laid_out(y, False)
    return type(y)(map(contiguous, y)) if type(y) in (list, tuple) else y


def preserves_layout(module: nn.Module) -> bool:
    """Returns whether a module accepts any format, computes the same in it, and preserves it."""
    return (
        type(module) in _LAYOUT_PRESERVING_MODULES
        and not has_hooks(module)
        and not getattr(module, "return_indices", False)
    )


class LayoutPass:
    """A copy of a graph, laid out for inputs in one memory format.

    Args:
        graph: of a forward that calls steps.
        module: whose forward it is.
        is_step: whether a node of the copy calls a step.
        input_format: which the copy is laid out for.
        flexible: the caller hands over a flexible value, and takes one.
        takes_flexible: whether a child is fused, takes flexible values and returns one.
    """

    def __init__(
        self,
        graph: fx.Graph,
        module: nn.Module,
        is_step: Callable[[fx.Node], bool],
        input_format: InputFormat,
        flexible: bool,
        takes_flexible: Callable[[nn.Module], bool],
    ) -> None:
        self.graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        self.graph.output(self.graph.graph_copy(graph, copied))
        self.flexible_calls: list[fx.Node] = []  # of fused children
        self.returns_flexible = False
        self.restores_input = False
        self.layout_preserving: set[str] = set()  # modules that are handed flexible values
        self._module, self._is_step, self._takes_flexible = module, is_step, takes_flexible
        self._input_format, self._flexible = input_format, flexible
        if input_format != "exported":
            self._insert_conversions()

    def _insert_conversions(self) -> None:
        sensitive = self._read_by_sensitive({}, set())[1]
        kinds, sensitive = self._read_by_sensitive({}, sensitive)
        for node in list(self.graph.nodes):
            if self._is_step(node) and any(kinds[n] == "eager" for n in node.all_input_nodes):
                node.target = f"{node.target}.with_eager_strides"
        if self._input_format != "contiguous":
            return
        for node in sensitive:
            self.restores_input |= node.op == "placeholder"
            with self.graph.inserting_after(node):
                restored = self.graph.call_function(contiguous, (node,))
            node.replace_all_uses_with(restored)
            restored.args = (node,)

    def _read_by_sensitive(
        self, kinds: dict[fx.Node, Kind], restored: set[fx.Node]
    ) -> tuple[dict[fx.Node, Kind], set[fx.Node]]:
        """Returns the kinds of all values, and the flexible ones that something reads which may
        ask.

        Args:
            kinds: filled in.
            restored: flexible values that are made contiguous as soon as they are there.
        """
        sensitive: set[fx.Node] = set()
        self.flexible_calls, self.layout_preserving = [], set()
        for node in self.graph.nodes:
            kind = self._kind_of(node, [kinds[n] for n in node.all_input_nodes])
            if kind is None:
                sensitive.update(n for n in node.all_input_nodes if kinds[n] == "flexible")
                kind = "eager"
            kinds[node] = kind
            if node in restored and kind == "flexible":
                sensitive.add(node)
                kinds[node] = "contiguous"
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        result = output.args[0]
        self.returns_flexible = isinstance(result, fx.Node) and kinds[result] == "flexible"
        return kinds, sensitive

    def _kind_of(self, node: fx.Node, read: list[Kind]) -> Kind | None:
        """Returns the kind of a node's result, None if the node may ask for its input's format."""
        if node.op == "placeholder":
            known: Kind = "flexible" if self._flexible else "contiguous"
            return "eager" if self._input_format == "any" else known
        if node.op == "output":
            return "eager" if self._flexible and isinstance(node.args[0], fx.Node) else None
        if not read or "eager" in read:
            return "eager" if self._is_step(node) and "flexible" not in read else None
        passed: Kind = "flexible" if "flexible" in read else "contiguous"
        if self._is_step(node):
            return "flexible"
        if node.op == "call_module":
            module = self._module.get_submodule(str(node.target))
            if len(node.args) != 1 or len(read) != 1 or node.kwargs:
                return None
            if preserves_layout(module) and not (
                getattr(module, "inplace", False) and _is_shared(node)
            ):
                self.layout_preserving.add(str(node.target))
                return passed
            if self._takes_flexible(module):
                self.flexible_calls.append(node)
                return "flexible"
            return None
        if node.target in _LAYOUT_PRESERVING_CALLS and "out" not in node.kwargs:
            return None if _writes(node) and _is_shared(node) else passed
        return "eager" if _flattens(node) and not _is_shared(node) else None


def _writes(node: fx.Node) -> bool:
    in_place = node.target in (operator.iadd, operator.imul, F.relu_, torch.relu_)
    named = isinstance(node.target, str) and node.target.endswith("_")
    return in_place or named or bool(node.kwargs.get("inplace"))


def _is_shared(node: fx.Node) -> bool:
    """Returns whether what a node reads first has other readers, which see what it writes."""
    first = node.args[0] if node.args else None
    return not isinstance(first, fx.Node) or first.op == "placeholder" or len(first.users) > 1


def _flattens(node: fx.Node) -> bool:
    """Returns whether a node is flatten(x, 1), whose result is contiguous for x in any format."""
    named = node.target in (torch.flatten, "flatten") and not node.kwargs
    return named and node.args[1:] in ((1,), (1, -1))


def feeds_convolutions_only(graph: fx.Graph, is_conv: Callable[[fx.Node], bool]) -> bool:
    """Returns whether all that reads the forward's inputs is convolutions, in place of their x:
    then of the inputs' strides only what they suggest matters."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    users = [(user, node) for node in inputs for user in node.users]
    return len(inputs) == 1 and all(
        is_conv(user) and user.args[0] is node and node not in user.args[1:] for user, node in users
    )
