"""The threads that compute native steps: results are the same bits whichever thread computes which
piece, and nothing that happens to a thread, a process or a call makes another wait for ever.
"""

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_native_chain import bottleneck, inputs_of
from test_native_strips import inverted_residual
from torch import Tensor

from graphs import conv_graph, conv_state, pool_graph
from native_problems import PROBLEMS, every_config, problem_of
from resfuse.kernels.cpu import library as native_library
from resfuse.kernels.cpu.conv_candidates import refusal
from resfuse.kernels.cpu.cpus import asking
from resfuse.kernels.cpu.library import library
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, MaxPool, Mean, State
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics.cpu import native, native_chain, native_rows

pytestmark = pytest.mark.slow

DISTURBED = ("-DRESFUSE_DISTURBED", "-O1")  # 11 CPU seconds to compile; with -O3 it is 18
WATCHDOG_S = 120


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """A call that never returns holds no lock that Python could break: the process ends.

    The library is compiled before: with sanitizers on a busy machine that may take a minute.
    """
    library("native", *DISTURBED)
    faulthandler.dump_traceback_later(WATCHDOG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library in which every third piece or so is held up."""
    monkeypatch.setattr(native_library, "library", lambda: library("native", *DISTURBED))


@pytest.fixture
def two_threads() -> Iterator[None]:
    with asking(2):
        yield


def answers(graph: Graph, state: State, choices: list[Candidate], threads: int) -> list[Tensor]:
    with asking(threads):
        executor = Executor(graph, choices, state)
        return [y.clone() for y in executor(*inputs_of(graph))]


def require_same_bits(graph: Graph, state: State, choice: Candidate) -> None:
    alone = answers(graph, state, [choice], 1)
    for threads in (2, 3, 5):
        for y, want in zip(answers(graph, state, [choice], threads), alone, strict=True):
            assert torch.equal(y, want), f"{choice.label()} on {threads} threads"


@pytest.mark.usefixtures("disturbed")
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_convolution_has_the_same_bits_on_any_number_of_threads(name: str) -> None:
    problem = replace(PROBLEMS[name], n=2)
    if refusal(problem) is not None:
        pytest.skip(str(refusal(problem)))
    graph, state = conv_graph(problem), conv_state(problem)
    offered = {choice.label(): choice for choice in native.segments(graph, 0)}
    assert len(every_config(problem)) >= len(offered) > 0
    for choice in offered.values():
        require_same_bits(graph, state, choice)


@pytest.mark.usefixtures("disturbed")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 16])
def test_joined_steps_have_the_same_bits_on_any_number_of_threads(stride: int, groups: int) -> None:
    graph, state = bottleneck(
        n=2, width=64, size=(23, 19), stride=stride, groups=groups, projection=True
    )
    whole = [c for c in native_chain.segments(graph, 0) if c.stop == len(graph.nodes)]
    assert whole
    for choice in whole:
        require_same_bits(graph, state, choice)


@pytest.mark.usefixtures("disturbed")
def test_strips_and_pools_have_the_same_bits_on_any_number_of_threads() -> None:
    problem = replace(PROBLEMS["ResNet's stem"], n=2, h=61, w=57)
    stem = conv_graph(problem)
    pool = pool_graph(MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), (2, 64, problem.p, problem.q))
    (node,) = pool.nodes
    last = replace(node, name="pooled", inputs=(stem.nodes[0].name,))
    values = {**stem.values, "pooled": pool.values[node.name]}
    graph = replace(stem, nodes=(*stem.nodes, last), values=values, outputs=("pooled",))
    state = conv_state(problem)
    choices = list(native_rows.segments(graph, 0))
    assert choices
    for choice in choices:
        require_same_bits(graph, state, choice)
    for op in (MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), Mean()):
        alone = pool_graph(op, (3, 70, 13, 11))
        require_same_bits(alone, {}, Candidate("native", 0, 1))


@pytest.mark.usefixtures("disturbed")
def test_strips_with_a_1x1_behind_have_the_same_bits_on_any_number_of_threads() -> None:
    wide = problem_of(2, 24, 31, 29, 144, 1, 1)
    depthwise = problem_of(2, 144, 31, 29, 144, 3, 3, padding=(1, 1), groups=144)
    graph, state = inverted_residual(wide, depthwise, 24, True)
    whole = [c for c in native_rows.segments(graph, 0) if c.stop == len(graph.nodes)]
    assert whole
    for choice in whole:
        require_same_bits(graph, state, choice)


def large(side: int = 28) -> tuple[Graph, State, list[Candidate]]:
    """A convolution of some milliseconds, or of a quarter of that on maps of half the side."""
    problem = replace(PROBLEMS["a block's 3x3"], n=4, h=side, w=side)
    graph = conv_graph(problem)
    choice = next(iter(native.segments(graph, 0)))
    return graph, conv_state(problem), [choice]


@pytest.mark.usefixtures("disturbed", "two_threads")
def test_callers_in_several_threads_get_what_each_gets_alone() -> None:
    graph, state, choices = large(14)  # with sanitizers a hundred calls of the other take 90 s
    executors = [Executor(graph, choices, state) for _ in range(5)]
    inputs = [[t + i for t in inputs_of(graph)] for i in range(5)]
    want = [[y.clone() for y in run(*x)] for run, x in zip(executors, inputs, strict=True)]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(20):
            got = executors[i](*inputs[i])
            if not all(torch.equal(y, w) for y, w in zip(got, want[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("slot", [0, 1])
def test_a_thread_that_fails_is_a_sentence_and_the_next_call_is_right(
    slot: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lib = library("native", *DISTURBED)
    monkeypatch.setattr(native_library, "library", lambda: lib)
    graph, state, choices = large()
    executor = Executor(graph, choices, state)
    want = [y.clone() for y in executor(*inputs_of(graph))]
    lib.resfuse_fail_on(slot)
    try:
        with pytest.raises(RuntimeError, match="a thread of the native steps has failed"):
            for _ in range(200):  # a helper may have had no piece
                executor(*inputs_of(graph))
    finally:
        lib.resfuse_fail_on(-1)
    assert torch.equal(executor(*inputs_of(graph))[0], want[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.usefixtures("disturbed", "two_threads")
def test_a_process_forked_in_the_middle_of_a_call_computes_on_one_thread() -> None:
    graph, state, choices = large()
    executor, other = Executor(graph, choices, state), Executor(graph, choices, state)
    inputs = inputs_of(graph)
    want = executor(*inputs)[0].clone()
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            other(*inputs)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        for _ in range(5):
            time.sleep(0.01)
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)  # the copies of the input are torch's
                os._exit(0 if _runs_on_one_thread(executor, inputs, want) else 1)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
    finally:
        stop.set()
        caller.join()
    assert torch.equal(executor(*inputs)[0], want)


def _runs_on_one_thread(executor: Executor, inputs: list[Tensor], want: Tensor) -> bool:
    right = all(torch.equal(executor(*inputs)[0], want) for _ in range(3))
    return right and len(list(Path("/proc/self/task").iterdir())) == 1


CALLS_UNTIL_KILLED = """
import sys, torch
from resfuse.kernels.cpu import program as step
from resfuse.kernels.cpu.packed_conv import NativeConv
from resfuse.kernels.ops.conv_problem import Geometry
torch.set_num_threads(2)
geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
conv = NativeConv(torch.randn(64, 64, 3, 3), torch.randn(64), geometry, "relu", None)
x = torch.randn(4, 64, 56, 56)
conv(x)
print("running", flush=True)
while True:
    conv(x)
"""


def test_an_interrupt_ends_a_process_whose_helpers_compute() -> None:
    """Signals go to the thread that Python listens on."""
    process = subprocess.Popen(
        [sys.executable, "-c", CALLS_UNTIL_KILLED],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell's background jobs ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert "KeyboardInterrupt" in said
    finally:
        process.kill()
        process.wait()
