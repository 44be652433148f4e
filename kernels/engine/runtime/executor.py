"""Executor: a graph with every node lowered by the tactic chosen for it, ready to run."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from resfuse.kernels.cpu.cpus import threads
from resfuse.kernels.cpu.program import Program, Step
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, Node, State
from resfuse.kernels.engine.ir.lowered import Call, Native, Values
from resfuse.kernels.engine.memory.buffers import Arena, WeightStore
from resfuse.kernels.engine.runtime.placement import native_values, place
from resfuse.kernels.engine.tactics import TACTICS

Item = Callable[[Values], None]


class Executor:
    """Runs a graph on values of fixed shapes.

    Values that native steps write are in one arena, and so are copies of the other values that they
    read. All remaining values are torch tensors, freed after their last use.
    """

    def __init__(
        self,
        graph: Graph,
        candidates: Sequence[Candidate],
        state: State,
        weight_store: WeightStore | None = None,
    ) -> None:
        """
        Args:
            weight_store: where to look for weights laid out before, and to add others.
        """
        self.graph = graph
        self._native = native_values(graph, candidates)
        self.weight_store = weight_store or WeightStore()
        layout = place(graph, candidates)
        self.arena = Arena(graph, layout, self.weight_store, Executor)
        self._views = {name: self.arena.view(name) for name in layout.placements}
        self._items: list[Item] = []
        self._copies: list[Item] = []  # those of the items that bring values into the arena
        self._steps: list[Step] = []
        self._copied: set[str] = set()
        self._freed: set[str] = set()
        for candidate in candidates:
            self._lower(candidate, state)
        self._flush()
        self._in_arena = {name: self._views[name] for name in self._native}

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Returns the outputs, which may lie in the arena; inputs are in the order of
        `graph.reads`."""
        values = self._in_arena | dict(zip(self.graph.reads, inputs, strict=True))
        for item in self._items:
            item(values)
        return [values[name] for name in self.graph.outputs]

    def weight_bytes(self, excluding: Iterable[Tensor] = ()) -> int:
        """Returns the bytes of the weights laid out by tactics, including those of executors that
        share them, without the storages of the tensors `excluding`."""
        return self.weight_store.size(excluding)

    def repeat(self, *inputs: Tensor) -> Callable[[], list[Tensor]]:
        """Returns a function that runs the graph on `inputs` without copying them into the arena,
        for timing: a call with the same inputs must have come before."""
        values = self._in_arena | dict(zip(self.graph.reads, inputs, strict=True))
        items = [item for item in self._items if item not in self._copies]

        @torch.inference_mode()
        def again() -> list[Tensor]:
            current = dict(values)
            for item in items:
                item(current)
            return [current[name] for name in self.graph.outputs]

        return again

    def _lower(self, candidate: Candidate, state: State) -> None:
        lowered = TACTICS[candidate.tactic].load().lower(self.graph, candidate, state, self.arena)
        nodes = self.graph.nodes[candidate.start : candidate.stop]
        if isinstance(lowered, Native):
            inner = self.graph.inner(candidate.start, candidate.stop)
            for name in dict.fromkeys(name for node in nodes for name in node.inputs):
                if name not in self._native | inner and name not in self._copied:
                    self._copy_in(name)
            self._steps += lowered.steps
        else:
            self._flush()
            self._items.append(self._call(lowered, nodes, candidate.stop))

    def _copy_in(self, name: str) -> None:
        self._flush()
        self._copied.add(name)
        view, zeros = self._views[name], self.arena.view_of_zeros(name)

        def copy(values: Values) -> None:
            view.copy_(values[name])
            if zeros.numel():  # another value may have lain there since
                zeros.zero_()

        self._items.append(copy)
        self._copies.append(copy)

    def _call(self, call: Call, nodes: Sequence[Node], stop: int) -> Item:
        """Returns a function that runs `call`, copies results that are views into the arena, and
        frees values after their last use."""
        arena = self.arena.pointer
        reads = {name for node in nodes for name in node.inputs}
        results = [node.name for node in nodes] if reads & self._native else []
        last = self.graph.last_read
        dead = [n for n, at in last.items() if at < stop and n not in self._native | self._freed]
        self._freed.update(dead)

        def run(values: Values) -> None:
            call.run(values)
            for name in results:
                if name in values and values[name].untyped_storage().data_ptr() == arena:
                    values[name] = values[name].clone()
            for name in dead:
                values.pop(name, None)

        return run

    def _flush(self) -> None:
        if self._steps:
            program = Program(self._steps, threads())
            self._items.append(lambda values: program())
            self._steps = []
