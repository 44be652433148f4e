"""A forward of convolutions and fused modules. Convolutions that follow each other, those of fused
blocks among them, are run as one region (conv_region.py), by one native call.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

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


class _Piece(NamedTuple):
    """Calls that are run at once: as a region, or one after another. Values have numbers: the
    forward's input is 0, the results of its calls follow.
    """

    calls: range  # the numbers of their results
    region: ConvRegion | None = None
    read: tuple[int, ...] = ()  # by the region
    signatures: tuple[Signature | None, ...] = ()  # of what it reads


class JoinedForward:
    """Runs a forward node by node, and from then on inputs of that signature in regions: while the
    guards of the whole model are known to hold (tree_guards.py). What failed a check or left the
    native kernels in that run is no part of a region.

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
        self._last_read = {i: at for at, (_, read) in enumerate(self._nodes, 1) for i in read}
        self._pieces: dict[Signature, list[_Piece]] = {}
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
        pieces = self._pieces.get(signature, [])
        if len(pieces) == 1 or self._tries.get(signature, 0) >= _MOST_TRIES:
            return self._run(module, x, pieces)
        return self._run_node_by_node(module, x, signature)

    def region_for(self, signature: Signature) -> ConvRegion | None:
        """Returns all that is done with inputs of a signature, if that is a region."""
        pieces = self._pieces.get(signature, [])
        return None if self._restores or len(pieces) != 1 else pieces[0].region

    def reset(self) -> None:
        """Forgets all regions."""
        self._pieces.clear()
        self._tries.clear()

    def _run(self, module: nn.Module, x: Tensor, pieces: Sequence[_Piece]) -> Any:
        if not pieces:
            return self._forward(module, x)
        values: dict[int, Any] = {0: x}
        for calls, region, read, signatures in pieces:
            given = [values[i] for i in read]
            if region is not None and tuple(map(_signature, given)) == signatures:
                values[calls[-1]] = region(*given)
            else:
                for number in calls:
                    target, read_by_it = self._nodes[number - 1]
                    values[number] = attrgetter(target)(module)(*(values[i] for i in read_by_it))
            for i in [
                i for i in values if i != self._result and self._last_read.get(i, 0) < calls.stop
            ]:
                del values[i]
        return self._restored(values[self._result])

    def _run_node_by_node(self, module: nn.Module, x: Tensor, signature: Signature) -> Any:
        if len(self._tries) >= _MOST_SIGNATURES:
            self.reset()
        self._tries[signature] = self._tries.get(signature, 0) + 1
        values, taken = [x], list[ConvRegion | FusedStep | None]()
        for target, read in self._nodes:
            before = self._fast_path.last_miss
            values.append(attrgetter(target)(module)(*(values[i] for i in read)))
            missed = self._fast_path.last_miss is not before or signature[-1]
            taken.append(None if missed else self._taken_in(module, target, values[read[0]]))
        pieces = self._joined(taken, list(map(_signature, values)))
        joins = any(piece.region is not None for piece in pieces)
        self._pieces[signature] = pieces if joins else []
        return self._restored(values[self._result])

    def _taken_in(self, module: nn.Module, target: str, x: Any) -> ConvRegion | FusedStep | None:
        """Returns what the call of a target has done, if a region can take it in.

        Args:
            x: the first argument of the call.
        """
        name = _name(target)
        if name in self._steps:
            return self._steps[name]
        flexible = self._calls.get(name)
        if flexible is not None:
            found: ConvRegion | None = flexible.plan.region_for(x, False, self._input_format, True)
            return found
        plan = plan_of(module.get_submodule(target))
        return None if plan is None else plan.region_for(x, False, None, False)

    def _joined(
        self,
        taken: Sequence[ConvRegion | FusedStep | None],
        signatures: Sequence[Signature | None],
    ) -> list[_Piece]:
        """Returns all calls in pieces, as few as there can be.

        Args:
            taken: of each call, what a region can take in.
            signatures: of the values.
        """
        pieces: list[_Piece] = []
        first = 1
        while first <= len(taken):
            stop = first + 1
            while stop <= len(taken) and (taken[first - 1] is None) == (taken[stop - 1] is None):
                stop += 1
            pieces.append(self._piece(range(first, stop), taken, signatures))
            first = stop
        return pieces

    def _piece(
        self,
        calls: range,
        taken: Sequence[ConvRegion | FusedStep | None],
        signatures: Sequence[Signature | None],
    ) -> _Piece:
        every = [i for number in calls for i in self._nodes[number - 1][1]]
        read = tuple(dict.fromkeys(i for i in every if i not in calls))
        leaving = [i for i in calls if i == self._result or self._last_read.get(i, 0) >= calls.stop]
        known = tuple(signatures[i] for i in read)
        if taken[calls[0] - 1] is None or leaving != [calls[-1]] or None in known:
            return _Piece(calls)
        region = ConvRegion(len(read))
        numbers = {value: number for number, value in enumerate(read)}
        for value in calls:
            step, given = taken[value - 1], [numbers[i] for i in self._nodes[value - 1][1]]
            if isinstance(step, ConvRegion):
                numbers[value] = region.embed(step, given[0])
            else:
                assert step is not None
                numbers[value] = region.add(step, given)
        region.returns([numbers[calls[-1]]])
        if not region.is_native():
            return _Piece(calls)
        return _Piece(calls, region, read, known)

    def _restored(self, y: Any) -> Any:
        return contiguous(y) if self._restores else y


def _signature(value: Any) -> Signature | None:
    return signature_of(value) if type(value) is Tensor else None


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
