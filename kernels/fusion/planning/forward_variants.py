"""A rewritten forward compiled for the memory formats it may be called with (memory_formats.py)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from resfuse.kernels.fusion.layers.fast_path import FastPath
from resfuse.kernels.fusion.layers.fused_layers import ConvStep, StemStep, Step
from resfuse.kernels.fusion.planning.forwards import Variant
from resfuse.kernels.fusion.planning.plan import NOT_RUN, STEPS, Plan, plan_of
from resfuse.kernels.fusion.planning.rewrite import (
    attribute_of,
    compile_forward,
    drop_checks,
)
from resfuse.kernels.fusion.tracing.memory_formats import (
    Laid,
    World,
    feeds_convolutions_only,
    laid_out,
    passes,
    strides_in,
    suggests_channels_last,
)
from resfuse.kernels.fusion.tracing.module_tracing import has_hooks, original_class


class GraphForwards:
    """A scope's forward, called one way, as a graph that calls steps.

    Args:
        graph: of the forward.
        steps: by attribute name.
        fast_path: to which its steps report; None where a forward without their checks may not be
            made.
    """

    def __init__(
        self,
        graph: fx.Graph,
        scope: nn.Module,
        steps: dict[str, Step],
        fast_path: FastPath | None,
    ) -> None:
        self._graph, self._scope, self._steps = graph, scope, steps
        self.fast_path = fast_path
        self._variants: dict[tuple[World, bool], Variant] = {}
        self._only_convolves = feeds_convolutions_only(graph, self._is_convolution)

    def lay_out(self) -> dict[str, Any]:
        """Compiles all variants; returns the calls of fused children in them, by attribute."""
        calls: dict[str, Any] = {}
        worlds: tuple[World, ...] = ("contiguous", "any", "exported")
        for world in worlds:
            for lenient in (False, True) if world == "contiguous" else (False,):
                self._variants[world, lenient] = self._variant(world, lenient, calls)
        return calls

    def called_modules(self) -> list[nn.Module]:
        """The modules that the forward calls, besides steps.

        Raises:
            ValueError: it runs functions that are not torch's, or a module is not there any more.
        """
        for node in self._graph.nodes:
            if node.op == "get_attr" or (
                node.op == "call_function" and not _is_torchs(node.target)
            ):
                raise ValueError(f"{node.target} may run code that is not torch's")
        try:
            return [
                self._scope.get_submodule(str(node.target))
                for node in self._graph.nodes
                if node.op == "call_module" and not self._is_step(node)
            ]
        except AttributeError as gone:
            raise ValueError(str(gone)) from None

    def variant(self, world: World, lenient: bool, *, guarded: bool = False) -> Variant:
        """The forward for a world.

        Args:
            guarded: the modules that it was made for are known to be in their places.
        """
        found = self._variants[world, lenient]
        if guarded:
            return found
        for holder, name, module in found.children:
            if holder.get(name) is not module or has_hooks(module):
                return self._variants["any", False]
        return found

    def world_of(self, args: tuple[Any, ...]) -> World:
        """That of a call with exact arguments, where no convolution's weight is channels_last, here
        or in a child; else it is "any"."""
        tensors = list(_tensors(args))
        if not tensors or any(x.dim() != 4 or x.numel() == 0 for x in tensors):
            return "any"
        only_suggests = self._only_convolves and not suggests_channels_last(tensors[0])
        return "contiguous" if only_suggests or _are_contiguous(tensors) else "any"

    def _variant(self, world: World, lenient: bool, calls: dict[str, Any]) -> Variant:
        def takes_loose(module: nn.Module) -> bool:
            plan = plan_of(module)
            return world == "contiguous" and plan is not None and plan.takes_loose()

        def laid(world: World) -> Laid:
            return Laid(self._graph, self._scope, self._is_step, world, lenient, takes_loose)

        name = f"{original_class(self._scope).__name__} {world}"
        one = laid(world)
        children = []
        for node in one.loose_calls:
            child_name = str(node.target)
            parent, _, last = child_name.rpartition(".")
            holder = self._scope.get_submodule(parent)._modules
            child = holder[last]
            assert child is not None
            children.append((holder, last, child))
            attribute = f"{world}_{child_name.replace('.', '_')}"
            plan = plan_of(child)
            assert plan is not None
            calls[attribute] = LooseCall(child, plan, world)
            node.target = f"{STEPS}.{attribute}"
        for passed in one.passed:
            parent, _, last = passed.rpartition(".")
            holder = self._scope.get_submodule(parent)._modules
            children.append((holder, last, self._scope.get_submodule(passed)))
        forward = compile_forward(one.graph, name)
        on_cpu = on_gpu = None
        if self.fast_path is not None and world != "exported":
            # where checked runs found nothing to lay out, there is nothing
            plain = one.graph if world == "contiguous" else laid("exported").graph
            if drop_checks(plain, self._steps):
                on_cpu = compile_forward(plain, f"{name} unchecked")
                if world == "any":
                    on_gpu = compile_forward(laid("exported").graph, f"{name} unchecked on a GPU")
        takes = one.returns_loose and not one.restores_input
        return Variant(world, forward, on_cpu, on_gpu, takes, children)

    def _is_step(self, node: fx.Node) -> bool:
        return node.op == "call_module" and str(node.target).startswith(f"{STEPS}.")

    def _is_convolution(self, node: fx.Node) -> bool:
        return self._is_step(node) and isinstance(
            self._steps[attribute_of(node)], ConvStep | StemStep
        )


class LooseCall:
    """Calls a fused child with a loose value, and takes one."""

    def __init__(self, child: nn.Module, plan: Plan, world: World) -> None:
        self._child, self._plan, self._world = child, plan, world

    def __call__(self, x: Tensor) -> Tensor:
        return run_loosely(self._child, self._plan, x, self._world, False)


def run_loosely(child: nn.Module, plan: Plan, x: Tensor, world: World, owned: bool) -> Tensor:
    """A fused child's result of a loose value, loose."""
    if plan.is_guarded() or not (child.training or has_hooks(child) or plan_of(child) is not plan):
        y = plan.run(child, (x,), {}, owned, world, lenient=True)
        if y is not NOT_RUN:
            fused: Tensor = y
            return fused
    original: Tensor = child(put_right(x, world))
    return original


def put_right(x: Tensor, world: World) -> Tensor:
    """A loose value as eager has it: the same tensor, since others see what is written to it."""
    if world != "contiguous":
        return x
    right = laid_out(x, False)
    if right is x or torch.compiler.is_compiling():
        return right
    x.set_(right)  # type: ignore[call-overload]
    return x


class SequenceForwards:
    """Sequential.forward with fused blocks in it: what one hands to the next may stay loose, and
    is nobody else's, so the next may add its residual in place. oneDNN then writes over what it
    reads, instead of fetching the lines of a new tensor first."""

    fast_path = None  # the blocks have theirs

    def __init__(self, sequence: nn.Sequential) -> None:
        self._sequence = sequence

    def lay_out(self) -> dict[str, Any]:
        return {}

    def called_modules(self) -> list[nn.Module]:
        return [child for child in self._sequence._modules.values() if child is not None]

    def variant(self, world: World, lenient: bool, *, guarded: bool = False) -> Variant:
        def forward(sequence: nn.Sequential, x: Any) -> Any:
            return _run_sequence(sequence, x, world, lenient)

        return Variant(
            world, forward, None, None, world == "contiguous" and self._stays_loose(), []
        )

    def world_of(self, args: tuple[Any, ...]) -> World:
        x = args[0]
        if not isinstance(x, Tensor) or x.dim() != 4 or x.numel() == 0:
            return "any"
        return "contiguous" if _are_contiguous([x]) else "any"

    def _stays_loose(self) -> bool:
        plans = [(child, plan_of(child)) for child in self._sequence]
        return any(plan is not None for _, plan in plans) and all(
            plan.takes_loose() if plan is not None else passes(child) for child, plan in plans
        )


def _run_sequence(sequence: nn.Sequential, x: Any, world: World, lenient: bool) -> Any:
    """Sequential.forward; the plan has seen to it that the children have no hooks."""
    if world == "any":
        return _run_exactly(sequence, x)
    loose, owned, lies_as_known = lenient, False, True
    for child in sequence._modules.values():
        assert child is not None
        plan = plan_of(child)
        if plan is not None and lies_as_known and plan.takes_loose():
            x = run_loosely(child, plan, x, world, owned)
            loose, owned = True, plan.returns_fresh
        elif loose and plan is None and passes(child) and not getattr(child, "inplace", False):
            x, owned = child(x), False
        else:
            x = child(put_right(x, world) if loose else x)
            loose, owned, lies_as_known = False, False, lies_as_known and passes(child)
    return x if lenient or not loose else put_right(x, world)


def _run_exactly(sequence: nn.Sequential, x: Any) -> Any:
    owned = False
    for child in sequence._modules.values():
        assert child is not None
        plan = plan_of(child)
        result = NOT_RUN if plan is None or child.training else plan.run(child, (x,), {}, owned)
        if plan is None or result is NOT_RUN:
            x, owned = child(x), False
        else:
            x, owned = result, plan.returns_fresh
    return x


def _is_torchs(function: Any) -> bool:
    """Whether a function is one of torch's or of Python's operators."""
    return getattr(function, "__module__", None) in _TORCHS or function in _BUILTINS


_TORCHS = ("torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "_operator")
_BUILTINS = (getattr, max, min, sum, int, float, bool, abs, round, math.floor, math.ceil)


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        yield from (t for t in (arg if isinstance(arg, list | tuple) else (arg,)) if _is_tensor(t))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _are_contiguous(tensors: list[Tensor]) -> bool:
    """As torch.empty makes them, sizes of one included."""
    return all(x.stride() == strides_in(x.shape, False) for x in tensors)
