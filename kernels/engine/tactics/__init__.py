"""TACTICS: every way to compute a segment of a graph, a file each.

A tactic's module has
- `refusal(device, dtype) -> str | None`: why it cannot run there, in one sentence;
- `segments(graph, at) -> Iterable[Choice]`: what it can do that starts with node `at`;
- `scratch(graph, choice) -> int`: bytes it needs while it runs (tactics in the arena only);
- `lower(graph, choice, state, room) -> Work`: the segment, ready to run.
"""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from resfuse.kernels.engine.choice import Choice
from resfuse.kernels.engine.graph import Graph, State
from resfuse.kernels.engine.room import Room
from resfuse.kernels.engine.work import Work


class TacticModule(Protocol):
    """What the module of a tactic has."""

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None: ...

    def segments(self, graph: Graph, at: int) -> Iterable[Choice]: ...

    def scratch(self, graph: Graph, choice: Choice) -> int: ...

    def lower(self, graph: Graph, choice: Choice, state: State, room: Room) -> Work: ...


@dataclass(frozen=True)
class Tactic:
    """Where to find a tactic, and what it does."""

    module: str
    does: str
    in_arena: bool = False  # reads and writes values at fixed addresses

    def load(self) -> TacticModule:
        return cast(TacticModule, importlib.import_module(self.module))


TACTICS: dict[str, Tactic] = {
    "native": Tactic(
        "resfuse.kernels.engine.tactics.native",
        "C++ for this processor: direct, Winograd and grouped convolutions, pools; float32, CPU",
        in_arena=True,
    ),
    "onednn": Tactic(
        "resfuse.kernels.engine.tactics.onednn", "oneDNN's fused convolutions, packed weights; CPU"
    ),
    "eager": Tactic("resfuse.kernels.engine.tactics.eager", "torch's own operations, one by one"),
}


def tactics_on(device: torch.device, dtype: torch.dtype) -> dict[str, TacticModule]:
    """Those that run there, by name."""
    loaded = {name: tactic.load() for name, tactic in TACTICS.items()}
    return {name: m for name, m in loaded.items() if m.refusal(device, dtype) is None}
