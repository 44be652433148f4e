"""An engine at work: answers, batches, what it tells, threads."""

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from engine_models import AS_FUSED, SHAPE, images, leaves, made, maps, require_answers, small
from graphs import error
from resfuse.kernels import Engine, build_engine
from resfuse.kernels.engine import build as build_module
from resfuse.kernels.engine.load import load_engine
from resfuse.kernels.engine.tuning.tuner import Tuner
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES
from resfuse.resnet_ref import create

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made(small)


@pytest.fixture
def engine(model: nn.Module, timings: Path) -> Engine:
    return build_engine(model, images(*SHAPE), timings=timings)


def test_a_resnet_by_measured_times(timings: Path) -> None:
    resnet = made(lambda: create("cifar_resnet20"))
    engine = build_engine(resnet, images(2, 3, 32, 32), timings=timings)
    require_answers(engine, resnet, images(2, 3, 32, 32, seed=2))
    require_answers(engine, resnet, images(2, 3, 32, 32, seed=3))


def test_a_model_in_bfloat16_is_right(timings: Path) -> None:
    model = made(small).to(torch.bfloat16)
    x = images(*SHAPE).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is barred
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.11's export warns of itself
        engine = build_engine(model, x, timings=timings)
    said = engine.explain()
    assert "native" in said
    (y,), (plain,) = leaves(engine, x), leaves(model, x)
    (want,) = leaves(copy.deepcopy(model).double(), x.double())
    assert y.dtype == torch.bfloat16
    assert error(y, want) <= EAGER_FACTOR * error(plain, want) + TOLERANCES["bf16"].rtol


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_are_in_the_inputs_format(timings: Path, layout: torch.memory_format) -> None:
    model = made(maps)
    engine = build_engine(model, images(*SHAPE), timings=timings)
    x = images(*SHAPE).contiguous(memory_format=layout)
    got = engine(x)
    assert got["map"].is_contiguous(memory_format=layout) and got["row"].is_contiguous()
    require_answers(engine, model, x)
    strided = images(2, 3, 33, 58)[..., ::2]  # of neither format
    require_answers(engine, model, strided)


def test_outputs_are_the_callers(engine: Engine) -> None:
    """A later call writes over nothing that an earlier one returned."""
    first = engine(images(*SHAPE))
    kept = first.clone()
    first_again = engine(images(*SHAPE, seed=9))
    assert torch.equal(first, kept) and not torch.equal(first, first_again)


# Batch sizes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_other_batches_are_padded(timings: Path, layout: torch.memory_format) -> None:
    model = made(maps)
    engine = build_engine(
        model, images(*SHAPE), batch_sizes=(4, 1), other_batches="pad", timings=timings
    )
    assert engine.batch_sizes == (1, 4)
    for count in (1, 2, 3, 4):
        x = images(count, *SHAPE[1:]).contiguous(memory_format=layout)
        require_answers(engine, model, x)
        assert engine(x)["map"].is_contiguous(memory_format=layout)
    with pytest.raises(ValueError, match="a batch of 5"):
        engine(images(5, *SHAPE[1:]))


def test_other_batches_run_as_the_model_is(timings: Path, model: nn.Module) -> None:
    engine = build_engine(model, images(*SHAPE), other_batches="eager", timings=timings)
    for count in (1, 2, 5):
        require_answers(engine, model, images(count, *SHAPE[1:]))


def test_other_batches_are_an_error(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"a batch of 3; this engine was built for 2"):
        engine(images(3, *SHAPE[1:]))


# What it tells


def test_memory_is_what_is_planned_and_held(engine: Engine) -> None:
    memory = engine.memory()
    n, _, h, w = SHAPE
    stem = 4 * n * 16 * ((h + 1) // 2) * ((w + 1) // 2)  # the largest map
    assert stem <= memory.least_arena_bytes <= memory.arena_bytes
    arena = engine._built[
        SHAPE
    ].executor.arena  # its floats end with a line that may be read, not used
    assert memory.arena_bytes <= arena._bytes.numel() <= memory.arena_bytes + 64
    weights = 3 * 16 * 49 + 16 * 32 * 9 + 16 * 32 + 32 * 4 * 9 + 64 * 10
    assert memory.weights_bytes == 0 or memory.weights_bytes > 4 * weights / 2
    with pytest.raises(ValueError, match="argument batch_size: 7"):
        engine.memory(7)


def test_the_former_names_of_memory_still_answer_and_are_deprecated(engine: Engine) -> None:
    memory = engine.memory()
    former = {
        "arena": memory.arena_bytes,
        "least": memory.least_arena_bytes,
        "weights": memory.weights_bytes,
        "originals": memory.originals_bytes,
        "graph_pool": memory.graph_pool_bytes,
        "graph_inputs": memory.graph_inputs_bytes,
    }
    for name, value in former.items():
        with pytest.warns(DeprecationWarning, match=rf"Memory\.{name} is now Memory\.\w+_bytes"):
            assert getattr(memory, name) == value


def test_an_engine_prints_one_line(engine: Engine) -> None:
    segments = engine._built[SHAPE].segments
    assert str(engine) == (
        f"Engine(N x 3x33x29 float32 on cpu, batch sizes 2; {len(segments)} segments, "
        f"{sum(s.ms for s in segments):.3f} ms one by one at batch 2)"
    )


def test_explain_has_a_line_for_every_segment(engine: Engine) -> None:
    lines = engine.explain().splitlines()
    graph = engine._built[SHAPE].graph
    lines_of_nodes = lines[2 : 2 + len(graph.nodes)]
    rows = [line for line in lines_of_nodes if not line.startswith("+ ")]
    assert lines[0].startswith("segment") and set(lines[1]) == {"-", " "}
    for row, what in zip(
        lines_of_nodes, ["stem 2x3x33x29 k16 7x7 /2 relu", "max-pool"], strict=False
    ):
        assert row.removeprefix("+ ").startswith(what)
    assert lines[2 + len(graph.nodes)] == "" and len(rows) == len(engine._built[SHAPE].segments)
    assert "aten.tanh.default" in lines[-1] and "1 segment" in lines[-1]
    assert f"{len(rows)} segments" in engine.explain()
    with pytest.raises(ValueError, match="argument batch_size: 7"):
        engine.explain(7)


def test_a_second_build_measures_nothing(timings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(small), images(*SHAPE)
    first = build_engine(model, x, timings=timings)
    (file,) = timings.iterdir()
    before = file.read_bytes()
    measurers: list[Tuner] = []

    class Noted(Tuner):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            measurers.append(self)

    monkeypatch.setattr(build_module, "Tuner", Noted)
    second = build_engine(model, x, timings=timings)
    assert [m.measured for m in measurers] == [0]
    assert file.read_bytes() == before
    assert second._built[SHAPE].segments == first._built[SHAPE].segments


# Threads


def in_threads(jobs: list[Callable[[], None]]) -> None:
    """All at once; raises what one of them raised."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], None]) -> None:
        try:
            start.wait()
            job()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def calling(engine: Engine, model: nn.Module, seed: int) -> Callable[[], None]:
    """Right answers for inputs of its own, twenty times."""
    inputs = [images(*SHAPE, seed=seed + i) for i in range(20)]
    wanted = [leaves(model, x) for x in inputs]

    def run() -> None:
        for x, want in zip(inputs, wanted, strict=True):
            for y, plain in zip(tree_leaves(engine(x)), want, strict=True):
                assert error(y, plain) < AS_FUSED

    return run


def test_threads_take_turns_with_one_engine(engine: Engine, model: nn.Module) -> None:
    in_threads([calling(engine, model, 100 * i) for i in range(3)])


def test_engines_run_side_by_side(engine: Engine, model: nn.Module, timings: Path) -> None:
    other = made(maps)
    beside = build_engine(other, images(*SHAPE), timings=timings)
    in_threads([calling(engine, model, 100), calling(beside, other, 200)])


@pytest.mark.usefixtures("two_threads")
def test_an_engine_of_several_threads(model: nn.Module, timings: Path, tmp_path: Path) -> None:
    engine = build_engine(model, images(*SHAPE), timings=timings)
    require_answers(engine, model, images(*SHAPE, seed=4))
    engine.save(tmp_path / "small.engine")
    torch.set_num_threads(1)
    with pytest.raises(ValueError, match=r"2 threads; here it is .* 1 threads"):
        load_engine(tmp_path / "small.engine")
