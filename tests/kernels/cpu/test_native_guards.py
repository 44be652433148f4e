"""Every candidate writes into its buffers and its scratch memory alone, and reads nothing of either
that it has not written.
"""

from dataclasses import asdict, replace
from types import ModuleType

import pytest
from test_native_chain import SHAPES, bottleneck, in_small_blocks, inputs_of, whole
from test_native_strips import BOTTLENECKS, STEMS, in_strips, inverted_residual, stem
from test_native_strips import bottleneck as read_in_windows

from graphs import conv_graph, conv_state, pool_graph, require_right
from guarded_memory import guarded
from native_problems import POOLS, PROBLEMS, every_config, problem_of
from resfuse.kernels.cpu import program, row_fusion
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.cpus import asking
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, Mean, State
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics.cpu import native, native_chain, native_rows
from resfuse.kernels.ops.conv_problem import Epilogue


def require_guarded(graph: Graph, state: State, choice: Candidate) -> None:
    with guarded() as guards:
        executor = Executor(graph, [choice], state)
        require_right(graph, executor, state, inputs_of(graph), scale=1.0)
        guards.require_intact()


def single(config: NativeConfig) -> Candidate:
    return Candidate("native", 0, 1, tuple(asdict(config).items()))


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
def test_convolutions(name: str, residual: bool) -> None:
    epilogue = Epilogue.of(PROBLEMS[name].activation, residual)
    problem = replace(PROBLEMS[name], n=2, epilogue=epilogue)
    for config in every_config(problem):
        require_guarded(conv_graph(problem), conv_state(problem), single(config))


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("name", POOLS)
def test_pools(name: str) -> None:
    graph = pool_graph(*POOLS[name])
    for choice in native.segments(graph, 0):
        require_guarded(graph, {}, choice)


@pytest.mark.usefixtures("thread_counts")
def test_a_mean() -> None:
    require_guarded(pool_graph(Mean(), (3, 70, 5, 7)), {}, Candidate("native", 0, 1))


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("shape", SHAPES)
def test_chains(shape: str) -> None:
    graph, state = bottleneck(**SHAPES[shape], projection=True, following=True)  # type: ignore[arg-type]
    choices = whole(graph)
    assert choices
    for choice in choices:
        require_guarded(graph, state, choice)
        if choice.settings["form"] == "direct":
            require_guarded(graph, state, in_small_blocks(choice))


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("name", [*STEMS, *BOTTLENECKS])
def test_strips(name: str) -> None:
    graph, state = stem(*STEMS[name]) if name in STEMS else read_in_windows(*BOTTLENECKS[name])
    require_strips_guarded(graph, state)


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("name", BOTTLENECKS)
def test_strips_with_a_1x1_behind(name: str) -> None:
    require_strips_guarded(*inverted_residual(*BOTTLENECKS[name], 24, True))


def require_strips_guarded(graph: Graph, state: State) -> None:
    whole = [c for c in native_rows.segments(graph, 0) if c.stop == len(graph.nodes)]
    assert whole
    for choice in whole:
        for joined in (choice, in_strips(choice, 2)):
            require_guarded(graph, state, joined)


# What takes all of its scratch memory on one thread: blocks that the map fills, whole panels


FULL = problem_of(1, 192, 6, 8, 128, 3, 3, padding=(1, 1))


@pytest.mark.parametrize("form", ["direct", "winograd"])
def test_scratch_memory_of_a_float_less_would_be_seen(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 12 fill 48 pixels, and 12 tiles, exactly; 192 channels are three whole slices."""
    config = NativeConfig(form, False, 12)  # type: ignore[arg-type]
    with asking(1):
        require_guarded(conv_graph(FULL), conv_state(FULL), single(config))
        asked = program.scratch_floats
        monkeypatch.setattr(program, "scratch_floats", lambda step: asked(step) - 1)
        with pytest.raises(AssertionError, match="outside of all buffers"):
            require_guarded(conv_graph(FULL), conv_state(FULL), single(config))


@pytest.mark.parametrize("tactic", [native_chain, native_rows])
def test_a_pixel_less_of_what_lies_between_fused_steps_would_be_seen(
    tactic: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tactic is native_chain:
        graph, state = bottleneck(size=(6, 8), width=48)
        choice = in_small_blocks(next(c for c in whole(graph) if c.settings["form"] == "direct"))
    else:
        graph, state = stem(*STEMS["ResNet's"])
        choice = in_strips(next(iter(native_rows.segments(graph, 0))), 2)
    with asking(1):
        require_guarded(graph, state, choice)
        asked = program.local_pixels
        asking_module = tactic if tactic is native_chain else row_fusion
        monkeypatch.setattr(asking_module, "local_pixels", lambda run: asked(run) - 1)
        with pytest.raises(AssertionError, match="outside of all buffers"):
            require_guarded(graph, state, choice)
