"""A forward that consists of convolutions and of fused blocks of convolutions, run as one region of
them all (conv_region.py) by one native call.
"""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from resfuse.kernels.fusion.layers.compound_layers import FusedStep
from resfuse.kernels.fusion.layers.conv_region import ConvRegion
from resfuse.kernels.fusion.layers.fast_path import FastPath, Forward, Signature, signature_of
from resfuse.kernels.fusion.planning.plan import STEPS, plan_of
from resfuse.kernels.fusion.tracing.memory_formats import InputFormat, contiguous

_MOST_SIGNATURES = 16  # of inputs for which it is known what to do
_MOST_TRIES = 3  # to join for inputs of a signature


class JoinedForward:
    """Runs a forward node by node, and from then on inputs of that signature as one region: while
    the guards of the whole model are known to hold (tree_guards.py), and if that run neither failed
    a check nor left the native kernels.

    Args:
        graph: of the forward, laid out for inputs in one memory format.
        forward: the same, compiled.
        steps: by attribute name.
        calls: of fused children that take flexible values, by attribute name (forward_variants.py).
        fast_path: to which the steps report.
    """

    def __init__(
        self,
        graph: fx.Graph,
        forward: Forward,
        steps: Mapping[str, FusedStep],
        calls: Mapping[str, Any],
        fast_path: FastPath,
        input_format: InputFormat,
    ) -> None:
        self._forward, self._steps, self._calls = forward, steps, calls
        self._fast_path, self._input_format = fast_path, input_format
        self._restores = any(node.target is contiguous for node in graph.nodes)
        self._nodes, self._result = _without_conversion(graph)
        self._regions: dict[Signature, ConvRegion] = {}
        self._tries: dict[Signature, int] = {}

    @staticmethod
    def takes(graph: fx.Graph, module: nn.Module, steps: Mapping[str, FusedStep]) -> bool:
        """Whether a graph has one input and one result, and nothing but convolutions and fused
        children in between, one child at least.
        """
        *run, last = graph.nodes
        if not isinstance(last.args[0], fx.Node):
            return False
        if sum(node.op == "placeholder" for node in run) != 1:
            return False
        kinds = [_kind(node, last, module, steps) for node in run if node.op != "placeholder"]
        return None not in kinds and "child" in kinds

    def __call__(self, module: nn.Module, x: Tensor) -> Any:
        plan = None if torch.compiler.is_compiling() else plan_of(module)
        if plan is None or not plan.is_guarded() or not x.is_cpu:
            return self._forward(module, x)
        signature = signature_of(x)
        region = self._regions.get(signature)
        if region is not None:
            return self._restored(region(x))
        if self._tries.get(signature, 0) >= _MOST_TRIES:
            return self._forward(module, x)
        return self._run_node_by_node(module, x, signature)

    def region_for(self, signature: Signature) -> ConvRegion | None:
        """Returns all that is done with inputs of a signature, if that is a region."""
        return None if self._restores else self._regions.get(signature)

    def reset(self) -> None:
        """Forgets all regions."""
        self._regions.clear()
        self._tries.clear()

    def _run_node_by_node(self, module: nn.Module, x: Tensor, signature: Signature) -> Any:
        if len(self._tries) >= _MOST_SIGNATURES:
            self.reset()
        self._tries[signature] = self._tries.get(signature, 0) + 1
        before = self._fast_path.last_miss
        region: ConvRegion | None = ConvRegion(1)
        values, numbers = [x], [0]
        for target, read in self._nodes:
            y = attrgetter(target)(module)(*(values[i] for i in read))
            numbers.append(0)
            if region is not None:
                number = self._add(
                    region, module, target, values[read[0]], [numbers[i] for i in read]
                )
                numbers[-1], region = number or 0, None if number is None else region
            values.append(y)
        missed = self._fast_path.last_miss is not before or signature[-1]
        if region is not None and not missed and region.is_native():
            region.returns([numbers[self._result]])
            self._regions[signature] = region
        return self._restored(values[self._result])

    def _add(
        self, region: ConvRegion, module: nn.Module, target: str, x: Tensor, read: list[int]
    ) -> int | None:
        """Adds to a region what the call of a target has done, and returns the number of its result
        there; None where it is no region.

        Args:
            x: the first argument of the call.
            read: the numbers of the arguments.
        """
        name = _name(target)
        if name in self._steps:
            return region.add(self._steps[name], read)
        flexible = self._calls.get(name)
        if flexible is not None:
            found = flexible.plan.region_for(x, False, self._input_format, True)
        else:
            plan = plan_of(module.get_submodule(target))
            found = plan and plan.region_for(x, False, None, False)
        return None if found is None else region.embed(found, read[0])

    def _restored(self, y: Any) -> Any:
        return contiguous(y) if self._restores else y


def _without_conversion(graph: fx.Graph) -> tuple[list[tuple[str, list[int]]], int]:
    """Returns the calls of a graph as targets and the numbers of the values that they read, and
    the number of its result. Its input has number 0, the calls' results follow.
    """
    calls: list[tuple[str, list[int]]] = []
    numbers: dict[fx.Node, int] = {}
    for node in graph.nodes:
        read = [numbers[arg] for arg in node.args if isinstance(arg, fx.Node)]
        if node.op == "output":
            return calls, read[0]
        if node.op == "placeholder":
            numbers[node] = 0
        elif node.op == "call_function":
            (numbers[node],) = read
        else:
            calls.append((str(node.target), read))
            numbers[node] = len(calls)
    raise ValueError("a graph without an output")


def _kind(
    node: fx.Node, last: fx.Node, module: nn.Module, steps: Mapping[str, FusedStep]
) -> str | None:
    """Returns what a node is: a step of convolutions, a fused child, or the conversion of the
    result; None for anything else.
    """
    if node.op == "call_function" and node.target is contiguous:
        return "conversion" if list(node.users) == [last] else None
    if node.op != "call_module" or node.kwargs:
        return None
    name = _name(str(node.target))
    if name in steps:
        return "convolutions" if ConvRegion.takes(steps[name]) else None
    if len(node.args) != 1:
        return None
    if str(node.target).startswith(f"{STEPS}."):  # one that takes flexible values
        return "child"
    return "child" if plan_of(module.get_submodule(str(node.target))) is not None else None


def _name(target: str) -> str:
    """Returns the attribute name of a step or of a flexible call."""
    return target.removesuffix(".with_eager_strides").rpartition(".")[2]
