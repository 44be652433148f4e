"""Memory formats: what leaves a fused module has the strides that eager's layers would have given
it, while NHWC, which steps compute in, goes from step to step as it is.

Eager on a CPU and on a GPU: a convolution's result is channels_last where its input or its weight
is, and dense. Batch norm, activations, pools and sums keep that, but for shapes
that are both (one channel, one pixel). A forward is compiled for two worlds:

- contiguous: inputs and weights are, so eager's results are, too. What a step makes in NHWC is
  "loose": it is put as eager has it where something reads it that may ask, and where it leaves.
  Steps, pools, activations, sums and fused children do not ask.
- any: every step sees to it that its result lies as eager's would ("exact"). With channels_last
  tensors it does as it is made, so there is nothing to do, and checked runs give way to straight
  ones.

A value is known (the input of a contiguous forward), loose, or exact.
"""

import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.kernels.fusion.tracing.module_tracing import has_hooks

World = Literal["contiguous", "any", "exported"]
Kind = Literal["known", "loose", "exact"]

_PASSING_MODULES = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU,
    nn.LeakyReLU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_PASSING_CALLS = (
    F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.silu, F.hardswish, F.leaky_relu,
    F.avg_pool2d, F.adaptive_avg_pool2d, torch.sigmoid, operator.add, operator.mul, operator.iadd,
    operator.imul, torch.add, torch.mul, torch.cat, "relu", "relu_", "sigmoid", "add", "add_",
    "mul", "mul_",
)  # fmt: skip


def strides_in(shape: torch.Size | tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """Of a dense [N, C, H, W], as torch.empty has them."""
    _, c, h, w = shape
    if channels_last:
        return (max(c, 1) * max(h, 1) * max(w, 1), 1, max(c, 1) * max(w, 1), max(c, 1))
    return (max(c, 1) * max(h, 1) * max(w, 1), max(h, 1) * max(w, 1), max(w, 1), 1)


def suggests_channels_last(x: Tensor) -> bool:
    """What c10's suggest_memory_format says of a tensor, by which layers choose."""
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
    """Whether eager's convolution of x by `weight` is channels_last."""
    if x.is_cuda and torch.float64 in (x.dtype, weight.dtype):  # cuDNN has no such convolution
        return False
    return suggests_channels_last(x) or suggests_channels_last(weight)


def laid_out(y: Tensor, channels_last: bool) -> Tensor:
    """y [N, C, H, W], dense in that format: itself, where it is."""
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
    """Whether tensors of a shape are contiguous and channels_last at once: eager's elementwise
    operations then make contiguous ones of them, unless they work in place."""
    return shape[1] == 1 or shape[2] == shape[3] == 1


def contiguous(y: Any) -> Any:
    """A loose value, or what holds some, as eager has it in the world of contiguous tensors."""
    if isinstance(y, Tensor):
        return laid_out(y, False)
    return type(y)(map(contiguous, y)) if type(y) in (list, tuple) else y


def passes(module: nn.Module) -> bool:
    """Whether a module takes any format, computes the same in it, and hands it on."""
    return (
        type(module) in _PASSING_MODULES
        and not has_hooks(module)
        and not getattr(module, "return_indices", False)
    )


class Laid:
    """A graph laid out for one world, in a copy.

    Args:
        graph: of a forward that calls steps.
        scope: whose forward it is.
        is_step: whether a node of the copy calls a step.
        world: that it is laid out for.
        lenient: the caller hands over a loose value, and takes one.
        takes_loose: whether a child is fused, takes loose values and returns one.
    """

    def __init__(
        self,
        graph: fx.Graph,
        scope: nn.Module,
        is_step: Callable[[fx.Node], bool],
        world: World,
        lenient: bool,
        takes_loose: Callable[[nn.Module], bool],
    ) -> None:
        self.graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        self.graph.output(self.graph.graph_copy(graph, copied))
        self.loose_calls: list[fx.Node] = []  # of fused children
        self.returns_loose = False
        self.restores_input = False
        self.passed: set[str] = set()  # modules that are handed loose values
        self._scope, self._is_step, self._takes_loose = scope, is_step, takes_loose
        self._world, self._lenient = world, lenient
        if world != "exported":
            self._lay_out()

    def _lay_out(self) -> None:
        sensitive = self._read_by_sensitive({}, set())[1]
        kinds, sensitive = self._read_by_sensitive({}, sensitive)
        for node in list(self.graph.nodes):
            if self._is_step(node) and any(kinds[n] == "exact" for n in node.all_input_nodes):
                node.target = f"{node.target}.exact"
        if self._world != "contiguous":
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
        """The kinds of all values, and the loose ones that something reads which may ask.

        Args:
            kinds: filled in.
            restored: loose values that are put right when they are made: then they are known.
        """
        sensitive: set[fx.Node] = set()
        self.loose_calls, self.passed = [], set()
        for node in self.graph.nodes:
            kind = self._kind_of(node, [kinds[n] for n in node.all_input_nodes])
            if kind is None:
                sensitive.update(n for n in node.all_input_nodes if kinds[n] == "loose")
                kind = "exact"
            kinds[node] = kind
            if node in restored and kind == "loose":
                sensitive.add(node)
                kinds[node] = "known"
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        made = output.args[0]
        self.returns_loose = isinstance(made, fx.Node) and kinds[made] == "loose"
        return kinds, sensitive

    def _kind_of(self, node: fx.Node, read: list[Kind]) -> Kind | None:
        """None where the node may ask for the format of what it reads."""
        if node.op == "placeholder":
            known: Kind = "loose" if self._lenient else "known"
            return "exact" if self._world == "any" else known
        if node.op == "output":
            return "exact" if self._lenient and isinstance(node.args[0], fx.Node) else None
        if not read or "exact" in read:
            return "exact" if self._is_step(node) and "loose" not in read else None
        passed: Kind = "loose" if "loose" in read else "known"
        if self._is_step(node):
            return "loose"
        if node.op == "call_module":
            module = self._scope.get_submodule(str(node.target))
            if len(node.args) != 1 or len(read) != 1 or node.kwargs:
                return None
            if passes(module) and not (getattr(module, "inplace", False) and _is_shared(node)):
                self.passed.add(str(node.target))
                return passed
            if self._takes_loose(module):
                self.loose_calls.append(node)
                return "loose"
            return None
        if node.target in _PASSING_CALLS and "out" not in node.kwargs:
            return None if _writes(node) and _is_shared(node) else passed
        return "exact" if _flattens(node) and not _is_shared(node) else None


def _writes(node: fx.Node) -> bool:
    in_place = node.target in (operator.iadd, operator.imul, F.relu_, torch.relu_)
    named = isinstance(node.target, str) and node.target.endswith("_")
    return in_place or named or bool(node.kwargs.get("inplace"))


def _is_shared(node: fx.Node) -> bool:
    """Whether what a node reads first has other readers, which see what it writes."""
    first = node.args[0] if node.args else None
    return not isinstance(first, fx.Node) or first.op == "placeholder" or len(first.users) > 1


def _flattens(node: fx.Node) -> bool:
    """flatten(x, 1), whose result lies in one row, whatever x did."""
    named = node.target in (torch.flatten, "flatten") and not node.kwargs
    return named and node.args[1:] in ((1,), (1, -1))


def feeds_convolutions_only(graph: fx.Graph, is_conv: Callable[[fx.Node], bool]) -> bool:
    """Whether all that reads the forward's inputs is convolutions, in place of their x: then of the
    inputs' strides only what they suggest matters."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    users = [(user, node) for node in inputs for user in node.users]
    return len(inputs) == 1 and all(
        is_conv(user) and user.args[0] is node and node not in user.args[1:] for user, node in users
    )
