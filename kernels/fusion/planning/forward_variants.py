"""A rewritten forward compiled for the memory formats it may be called with (memory_formats.py)."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from resfuse.kernels.fusion.layers.compound_layers import FusedStep, StemStep
from resfuse.kernels.fusion.layers.conv_region import ConvRegion
from resfuse.kernels.fusion.layers.fast_path import FastPath, signature_of
from resfuse.kernels.fusion.layers.fused_layers import ConvStep
from resfuse.kernels.fusion.planning.forwards import CalledModule, Variant
from resfuse.kernels.fusion.planning.joined_forward import JoinedForward
from resfuse.kernels.fusion.planning.plan import NOT_RUN, STEPS, Plan, plan_of
from resfuse.kernels.fusion.planning.rewrite import (
    attribute_of,
    compile_forward,
    drop_checks,
    join_convolutions,
    runs_unchecked,
    whole_region,
)
from resfuse.kernels.fusion.tracing.memory_formats import (
    InputFormat,
    LayoutPass,
    feeds_convolutions_only,
    laid_out,
    strides_in,
    suggests_channels_last,
)
from resfuse.kernels.fusion.tracing.module_tracing import has_hooks, original_class


class GraphForwards:
    """A module's forward, called one way, as a graph that calls steps.

    Args:
        graph: of the forward.
        steps: by attribute name.
        prefix: of their attribute names.
        fast_path: to which its steps report; None where a forward without their checks may not be
            made.
    """

    def __init__(
        self,
        graph: fx.Graph,
        module: nn.Module,
        steps: dict[str, FusedStep],
        prefix: str,
        fast_path: FastPath | None,
    ) -> None:
        self._graph, self._module, self._steps, self._prefix = graph, module, steps, prefix
        self.fast_path = fast_path
        self._variants: dict[tuple[InputFormat, bool], Variant] = {}
        self._only_convolves = feeds_convolutions_only(graph, self._is_convolution)

    def compile_variants(self) -> dict[str, Any]:
        """Compiles all variants; returns the calls of fused children in them, by attribute."""
        calls: dict[str, Any] = {}
        formats: tuple[InputFormat, ...] = ("contiguous", "any", "exported")
        for input_format in formats:
            for flexible in (False, True) if input_format == "contiguous" else (False,):
                self._variants[input_format, flexible] = self._variant(
                    input_format, flexible, calls
                )
        return calls

    def called_modules(self) -> list[CalledModule]:
        """The modules that the forward calls, besides steps.

        Raises:
            ValueError: it runs functions that are not torch's, or a module is not there any more.
        """
        return modules_called_in(self._graph, self._module, self._is_step)

    def variant(
        self, input_format: InputFormat, flexible: bool, *, guarded: bool = False
    ) -> Variant:
        """Returns the forward for inputs in one memory format.

        Args:
            guarded: the caller has checked that the modules it was made for are in their places.
        """
        found = self._variants[input_format, flexible]
        if guarded:
            return found
        for holder, name, module in found.children:
            if holder.get(name) is not module or has_hooks(module):
                return self._variants["any", False]
        return found

    def input_format_of(self, args: tuple[Any, ...]) -> InputFormat:
        """Returns the format of these arguments, which lie as eager's do.

        No convolution's weight is channels_last, here or in a child; else the format is "any".
        """
        tensors = list(_tensors(args))
        if not tensors or any(x.dim() != 4 or x.numel() == 0 for x in tensors):
            return "any"
        only_suggests = self._only_convolves and not suggests_channels_last(tensors[0])
        return "contiguous" if only_suggests or are_contiguous(tensors) else "any"

    def region_for(self, x: Tensor, input_format: InputFormat, flexible: bool) -> ConvRegion | None:
        """Returns all that a guarded call with `x`, on a CPU, does, where that is convolutions
        without their checks; else None.
        """
        found, fast_path = self._variants[input_format, flexible], self.fast_path
        if isinstance(found.forward, JoinedForward):
            return found.forward.region_for(signature_of(x))
        if fast_path is None or found.unchecked_on_cpu is None:
            return None
        return found.region if fast_path.holds(found.unchecked_on_cpu, signature_of(x)) else None

    def reset(self) -> None:
        """Has the next call make all checks."""
        if self.fast_path is not None:
            self.fast_path.reset()
        for found in self._variants.values():
            if isinstance(found.forward, JoinedForward):
                found.forward.reset()

    def _variant(self, input_format: InputFormat, flexible: bool, calls: dict[str, Any]) -> Variant:
        def takes_flexible(module: nn.Module) -> bool:
            plan = plan_of(module)
            return input_format == "contiguous" and plan is not None and plan.takes_flexible()

        def layout_for(input_format: InputFormat) -> LayoutPass:
            return LayoutPass(
                self._graph, self._module, self._is_step, input_format, flexible, takes_flexible
            )

        name = f"{original_class(self._module).__name__} {input_format}"
        layout = layout_for(input_format)
        children = []
        for node in layout.flexible_calls:
            child_name = str(node.target)
            parent, _, last = child_name.rpartition(".")
            holder = self._module.get_submodule(parent)._modules
            child = holder[last]
            assert child is not None
            children.append((holder, last, child))
            attribute = f"{input_format}_{child_name.replace('.', '_')}"
            plan = plan_of(child)
            assert plan is not None
            calls[attribute] = FlexibleCall(child, plan, input_format)
            node.target = f"{STEPS}.{attribute}"
        for child_name in layout.layout_preserving:
            parent, _, last = child_name.rpartition(".")
            holder = self._module.get_submodule(parent)._modules
            children.append((holder, last, self._module.get_submodule(child_name)))
        forward = compile_forward(layout.graph, name)
        on_cpu = on_gpu = region = None
        if self.fast_path is not None and input_format != "exported":
            # where checked runs found nothing to lay out, there is nothing
            plain = layout.graph if input_format == "contiguous" else layout_for("exported").graph
            unchecked = runs_unchecked(plain, self._steps)
            if unchecked and input_format == "any":
                on_gpu = compile_forward(layout_for("exported").graph, f"{name} unchecked on a GPU")
            if JoinedForward.takes(layout.graph, self._module, self._steps):
                forward = JoinedForward(
                    layout.graph, forward, self._steps, calls, self.fast_path, input_format
                )
            elif unchecked:
                region = whole_region(plain, self._steps)
                prefix = f"{self._prefix}{input_format}{'_flexible' * flexible}"
                calls |= join_convolutions(plain, self._steps, prefix)
                drop_checks(plain, self._steps)
                on_cpu = compile_forward(plain, f"{name} unchecked")
        takes = layout.returns_flexible and not layout.restores_input
        return Variant(input_format, forward, on_cpu, on_gpu, takes, children, region)

    def _is_step(self, node: fx.Node) -> bool:
        return node.op == "call_module" and str(node.target).startswith(f"{STEPS}.")

    def _is_convolution(self, node: fx.Node) -> bool:
        return self._is_step(node) and isinstance(
            self._steps[attribute_of(node)], ConvStep | StemStep
        )


def modules_called_in(
    graph: fx.Graph, module: nn.Module, is_step: Callable[[fx.Node], bool]
) -> list[CalledModule]:
    """Returns the modules that the graph of a module's forward calls, besides steps, and those
    whose tensors it reads.

    Raises:
        ValueError: it runs functions that are not torch's, or a module is not there any more.
    """
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and not _is_torchs(node.target):
            raise ValueError(f"{node.target} may run code that is not torch's")
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            read = _submodule(module, owner)
            if name not in read._parameters and name not in read._buffers:
                raise ValueError(f"{node.target} is no parameter and no buffer")
            if owner:
                found.append(CalledModule(read, None))
        if node.op == "call_module" and not is_step(node):
            called = _submodule(module, str(node.target))
            tensors = not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args)
            found.append(CalledModule(called, len(node.args) if tensors else None))
    return found


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as gone:
        raise ValueError(str(gone)) from None


class FlexibleCall:
    """Calls a fused child with a flexible value, and returns one."""

    def __init__(self, child: nn.Module, plan: Plan, input_format: InputFormat) -> None:
        self._child, self.plan, self._input_format = child, plan, input_format

    def __call__(self, x: Tensor) -> Tensor:
        return run_flexible(self._child, self.plan, x, self._input_format, False)


def run_flexible(
    child: nn.Module, plan: Plan, x: Tensor, input_format: InputFormat, donated: bool
) -> Tensor:
    """Returns the flexible result of a fused child for a flexible value."""
    if plan.is_guarded() or not (child.training or has_hooks(child) or plan_of(child) is not plan):
        y = plan.run(child, (x,), {}, donated, input_format, flexible=True)
        if y is not NOT_RUN:
            fused: Tensor = y
            return fused
    original: Tensor = child(restore_layout(x, input_format))
    return original


def restore_layout(x: Tensor, input_format: InputFormat) -> Tensor:
    """Puts a flexible value into the format that eager gives it.

    It stays the same tensor object, since a child may write to it and others must see that.
    """
    if input_format != "contiguous":
        return x
    right = laid_out(x, False)
    if right is x or torch.compiler.is_compiling():
        return right
    x.set_(right)  # type: ignore[call-overload]
    return x


def _is_torchs(function: Any) -> bool:
    """Whether a function is one of torch's or of Python's operators."""
    return getattr(function, "__module__", None) in _TORCHS or function in _BUILTINS


_TORCHS = (
    "torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "_operator",
    "torchvision.ops.stochastic_depth",
)  # fmt: skip
_BUILTINS = (getattr, max, min, sum, int, float, bool, abs, round, math.floor, math.ceil)


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        yield from (t for t in (arg if isinstance(arg, list | tuple) else (arg,)) if _is_tensor(t))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def are_contiguous(tensors: list[Tensor]) -> bool:
    """Whether all strides are those of torch.empty, also those of sizes of one."""
    return all(x.stride() == strides_in(x.shape, False) for x in tensors)
