"""What an engine's build compiles before it measures: written down on meta tensors, compiled here
for a GPU that need not be here, in a subprocess that does not interpret kernels."""

import io
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.tactics import TACTICS, tactics_for
from resfuse.kernels.engine.tactics.gpu import triton_kernels
from resfuse.kernels.engine.tuning import compile_ahead as compile_ahead_module
from resfuse.kernels.engine.tuning import compile_processes
from resfuse.kernels.engine.tuning.compile_ahead import compile_ahead, compile_launches, launches
from resfuse.kernels.gpu.common import c_launchers
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.gpu.common.stand_in_driver import stand_in
from resfuse.kernels.gpu.inspect.inspect import Specialized
from resfuse.kernels.gpu.registry import KERNELS
from without_interpreter import output_of, printed_by

pytestmark = pytest.mark.slow


def two_equal_convolutions() -> tuple[Graph, State, list[Candidate]]:
    """A graph, and every candidate for its nodes."""
    layers = [m for _ in range(2) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers).eval().half()
    graph, state = capture(model, torch.zeros(1, 64, 8, 8, dtype=torch.float16))
    tactics = tactics_for("cuda").values()
    offered = [c for at in range(len(graph.nodes)) for t in tactics for c in t.segments(graph, at)]
    return graph, state, offered


def test_launches_are_written_down_once_and_not_run() -> None:
    graph, state, offered = two_equal_convolutions()
    ours = [
        c
        for c in offered
        if TACTICS[c.tactic].module.split(".")[-1] in ("triton_conv", "triton_split_k")
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


def run_what_was_compiled() -> None:
    """For the subprocess: prints launches and kernels made ahead of them, then what Triton compiles
    when they are launched."""
    graph, state, offered = two_equal_convolutions()
    some = [c for c in offered if c.tactic == "triton_conv"][:2]
    count = compile_ahead(graph, state, some, 90)
    made = made_in_cache()
    with stand_in() as driver:
        for launch in launches(graph, state, some):
            launch.run()
    print(json.dumps([count, made, driver.launches, driver.compiled, driver.launchers_missing]))


def test_a_build_compiles_nothing_after_it_was_compiled_ahead(tmp_path: Path) -> None:
    """Neither kernels nor, with triton 3.6, launchers: what compile_ahead makes has the keys of
    Triton's own launches."""
    told = printed_by("test_compile_ahead", "run_what_was_compiled", tmp_path)
    assert json.loads(told) == [2, 2, 2, [], []]


def compile_with_one_failure() -> None:
    """For the subprocess: the first compilation raises; prints how many kernels were made."""
    graph, state, offered = two_equal_convolutions()
    failures = [RuntimeError("a race")]
    compile_kernel = compile_ahead_module._compile

    def fail_once(kernel: Specialized) -> None:
        if failures:
            raise failures.pop()
        compile_kernel(kernel)

    compile_ahead_module._compile = fail_once
    compile_ahead(graph, state, [c for c in offered if c.tactic == "triton_conv"][:2], 90)
    print(made_in_cache())


def test_what_fails_beside_others_is_tried_again_alone(tmp_path: Path) -> None:
    assert printed_by("test_compile_ahead", "compile_with_one_failure", tmp_path) == "2\n"


def made_in_cache() -> int:
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")))


def shipped_launches() -> list[Launch]:
    """One of each kernel, in fp16 where its label says so, with tensors on meta."""
    found = []
    for kernel in KERNELS.values():
        half = [a for label, a in kernel.launches() if "fp16" in label or "float16" in label]
        found.append((half or [launch for _, launch in kernel.launches()])[0])
    return found


def run_every_kernel() -> None:
    found = shipped_launches()
    compile_launches(found * 2, 90)
    made = made_in_cache()
    with stand_in() as driver:
        for launch in found:
            launch.run()
    needed = len(driver.launchers)
    left = len(driver.compiled) + len(driver.launchers_missing)
    print(json.dumps([made, driver.launches, left, needed]))


def test_keys_are_those_of_tritons_own_launches_for_every_kernel(tmp_path: Path) -> None:
    made, launched, compiled, launchers = json.loads(
        printed_by("test_compile_ahead", "run_every_kernel", tmp_path)
    )
    assert made == launched == len(KERNELS)
    assert compiled == 0
    assert launchers == (len(KERNELS) if hasattr(c_launchers.nvidia, "make_launcher") else 0)


def compile_by_processes() -> None:
    """Prints what processes made of four launches, then what is made where none can be started, and
    where the parent of a process is gone."""
    found = shipped_launches()[:4]
    compile_processes.run_processes([*found[:2], "no launch"], 90, 2)  # type: ignore[list-item]
    told = [made_in_cache()]
    for orphaned in (True, False):
        parent = 1 if orphaned else os.getppid()
        jobs = [compile_processes._pickled(found[2])]
        compile_processes.compile_all(io.BytesIO(pickle.dumps((parent, 90, jobs))))
        told.append(made_in_cache())
    compile_processes.processes_for = lambda *_: 2  # type: ignore[assignment]
    sys.executable = "/no/python"
    compile_launches(found, 90)
    print(json.dumps([*told, made_in_cache()]))


def test_processes_compile_and_threads_do_what_they_did_not(tmp_path: Path) -> None:
    told = printed_by("test_compile_ahead", "compile_by_processes", tmp_path)
    assert json.loads(told) == [2, 2, 3, 4]


def test_a_script_that_builds_at_its_top_is_not_run_again(tmp_path: Path) -> None:
    """As multiprocessing would: no `if __name__ == "__main__"` stands in its way."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\n"
        "from test_compile_ahead import compile_processes, made_in_cache, shipped_launches\n"
        "compile_processes.run_processes(shipped_launches()[:1], 90, 1)\n"
        "print(made_in_cache())\n"
    )
    assert output_of([str(script)], tmp_path).split() == ["once", "1"]


@pytest.mark.parametrize(
    ("kernels", "cores", "free_gb", "processes"),
    [
        (418, 16, 100, 16),
        (418, 192, 1000, 26),  # sixteen kernels each
        (1113, 192, 1000, 32),
        (418, 8, 100, 0),  # threads keep eight cores busy
        (418, 2, 100, 0),
        (100, 16, 100, 0),  # they would be done before six processes have imported torch
        (418, 16, 10, 10),
        (418, 16, 4, 0),
        (0, 16, 100, 0),
    ],
)
def test_processes_only_where_they_pay(
    kernels: int, cores: int, free_gb: int, processes: int
) -> None:
    assert compile_processes.processes_for(kernels, cores, free_gb << 30) == processes


def test_free_memory_is_what_linux_says() -> None:
    free = compile_processes.free_bytes()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert (0 < free <= total) if sys.platform == "linux" else free == 0
