"""What an engine's build compiles before it measures: written down on meta tensors, compiled here
for a GPU that need not be here, in a subprocess that does not interpret kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from resfuse.kernels.engine.capture import capture
from resfuse.kernels.engine.choice import Choice
from resfuse.kernels.engine.compile_ahead import compile_ahead, launches
from resfuse.kernels.engine.graph import Graph, State
from resfuse.kernels.engine.tactics import TACTICS, tactics_for, triton_kernels


def two_equal_convolutions() -> tuple[Graph, State, list[Choice]]:
    """A graph, and every choice for its nodes."""
    layers = [m for _ in range(2) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers).eval().half()
    graph, state = capture(model, torch.zeros(1, 64, 8, 8, dtype=torch.float16))
    tactics = tactics_for("cuda").values()
    offered = [c for at in range(len(graph.nodes)) for t in tactics for c in t.segments(graph, at)]
    return graph, state, offered


def test_launches_are_written_down_once_and_not_run() -> None:
    graph, state, offered = two_equal_convolutions()
    ours = [
        c for c in offered if TACTICS[c.tactic].module.split(".")[-1] in ("triton_conv", "split_k")
    ]
    assert {c.start for c in ours} == {0, 1} and len(ours) < len(offered)
    written = list(launches(graph, state, offered))
    assert len(written) == len(ours) / 2
    assert all(launch.args["x_ptr"].is_meta for launch in written)
    assert {launch.args["M"] for launch in written} == {64}


def test_one_that_cannot_be_written_down_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, state, offered = two_equal_convolutions()
    module = TACTICS["split_k"].load()

    def refuse(*_: object) -> None:
        raise ValueError("no")

    before = len(list(launches(graph, state, offered)))
    monkeypatch.setattr(module, "lower", refuse)
    split = len({c.label() for c in offered if c.tactic == "split_k"})
    assert split and len(list(launches(graph, state, offered))) == before - split


def test_what_is_written_down_ends_with_its_block() -> None:
    with triton_kernels.written_down() as outer:
        with triton_kernels.written_down() as inner:
            triton_kernels.run("a launch")  # type: ignore[arg-type]
        triton_kernels.run("another")  # type: ignore[arg-type]
    assert (inner, outer) == (["a launch"], ["another"])


def compile_twice() -> None:
    """For the subprocess: prints launches, kernels in Triton's cache, and how many more the same
    launches then need."""
    from triton.backends.compiler import GPUTarget

    from resfuse.kernels.inspect import compile_launch

    cache = Path(os.environ["TRITON_CACHE_DIR"])
    graph, state, offered = two_equal_convolutions()
    some = [c for c in offered if c.tactic == "triton_conv"][:2]
    count = compile_ahead(graph, state, some, 90)
    made = len(list(cache.glob("*/*.cubin")))
    for launch in launches(graph, state, some):
        compile_launch(launch, GPUTarget("cuda", 90, 32))
    print(count, made, len(list(cache.glob("*/*.cubin"))) - made)


def test_kernels_are_in_tritons_cache_afterwards(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("TRITON_INTERPRET", None)
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "import test_compile_ahead as t; t.compile_twice()"],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["2", "2", "0"]
