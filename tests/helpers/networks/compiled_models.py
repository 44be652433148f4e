"""A network for tests of torch.compile with the engine, compiled without timing anything."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.backends import registry

from engine_models import conv
from graphs import error
from resfuse.kernels import Engine, build_engine, compile_backend
from resfuse.kernels.engine import build as build_module
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.planning.planner import Plan, Segment
from resfuse.kernels.engine.tactics.cpu import native
from resfuse.kernels.engine.torch_compile import compile_backend as backend_module
from scope import Scope

SHAPE = (2, 3, 8, 9)
CLOSE = 1e-5
NO_ENGINE = "inductor compiles a graph that no engine can run: "


@contextmanager
def untimed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans are native steps where there are any. And inductor is a stand-in that runs the graph as
    it is, for it compiles C++ for seconds. A warning of ours is an error unless a test expects it.
    """

    def planned(graph: Graph, *args: Any) -> Plan:
        found = [
            Segment([*native.segments(graph, at), Candidate("eager", at, at + 1)][0], 0.001)
            for at in range(len(graph.nodes))
        ]
        return Plan(tuple(found), 0)

    monkeypatch.setattr(build_module, "tuned_plan", planned)
    registry.lookup_backend("inductor")
    monkeypatch.setitem(registry._COMPILER_FNS, "inductor", lambda gm, inputs: gm.forward)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    torch.compiler.reset()


def noted_engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Returns a list that the engines of compiled graphs are added to from now on."""
    found: list[Engine] = []

    @functools.wraps(build_engine)
    def noted(*args: Any, **options: Any) -> Engine:
        found.append(build_engine(*args, **options))
        return found[-1]

    monkeypatch.setattr(backend_module, "build_engine", noted)
    return found


def net() -> nn.Module:
    """With a buffer, and a tensor that is neither buffer nor parameter."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.norm(s.first(x)).relu() + s.offset
        return s.head(s.drop(y).mean((2, 3)).view(x.shape[0], -1)) * s.scale

    model = Scope(
        forward, first=conv(3, 16), norm=nn.BatchNorm2d(16), head=nn.Linear(16, 4),
        drop=nn.Dropout(),
    )  # fmt: skip
    model.register_buffer("offset", torch.linspace(-1, 1, 16).view(16, 1, 1))
    model.scale = torch.tensor([2.0])
    return model


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=compile_backend, options=options or None)


def require_right(fast: Callable[..., Any], model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        got, want = fast(x), model(x)
    assert got.shape == want.shape and got.stride() == want.stride()
    assert error(got, want) < CLOSE
