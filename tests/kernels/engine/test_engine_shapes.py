"""One engine for several shapes: what it answers, shares, builds when it is called, and drops."""

import gc
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_models import conv, images, made, require_answers
from resfuse.kernels import Engine, build_engine, load_engine
from resfuse.kernels.engine import build as build_module
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.planning.planner import Plan, Segment
from resfuse.kernels.engine.tactics.cpu import native
from scope import Scope

pytestmark = [pytest.mark.usefixtures("kept_exports"), pytest.mark.slow]

SMALL, WIDE, TALL = (2, 3, 8, 9), (2, 3, 8, 14), (1, 3, 15, 9)
BEYOND = (2, 3, 10, 10)


@pytest.fixture(autouse=True)
def by_eager(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, ...], str]:
    """Nothing is timed: plans are torch's operations, or native steps for the shapes in the dict
    that this returns."""
    tactics: dict[tuple[int, ...], str] = {}

    def planned(graph: Graph, *args: Any) -> Plan:
        tactic = tactics.get(graph.values[graph.input].shape, "eager")
        found = []
        for at in range(len(graph.nodes)):
            offered = list(native.segments(graph, at)) if tactic == "native" else []
            found.append(Segment([*offered, Candidate("eager", at, at + 1)][0], 0.001))
        return Plan(tuple(found), 0)

    monkeypatch.setattr(build_module, "tuned_plan", planned)
    return tactics


def net() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.head(s.norm(s.second(s.first(x).relu())).sigmoid().mean((2, 3)))

    layers = {"first": conv(3, 32), "second": conv(32, 32), "norm": nn.BatchNorm2d(32)}
    return Scope(forward, **layers, head=nn.Linear(32, 4))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made(net)


def of_small(model: nn.Module, **options: Any) -> Engine:
    return build_engine(model, images(*SMALL), **options)


# A set of shapes


def test_each_shape_of_a_set_is_answered_and_no_other(model: nn.Module) -> None:
    engine = of_small(model, shapes=[TALL, SMALL, WIDE, SMALL])
    assert engine.shapes == (SMALL, WIDE, TALL) and engine.batch_sizes == (1, 2)
    for shape in engine.shapes:
        require_answers(engine, model, images(*shape))
    with pytest.raises(ValueError) as why:
        engine(images(*BEYOND))
    assert str(why.value) == (
        "argument x: shape (2, 3, 10, 10); this engine takes [N, 3, 8, 9] or [N, 3, 8, 14] or "
        "[N, 3, 15, 9]"
    )
    with pytest.raises(ValueError, match="a batch of 2; this engine was built for 1 and other_bat"):
        engine(images(2, *TALL[1:]))


def test_the_example_gives_the_memory_format(model: nn.Module) -> None:
    """Of its own shape nothing is built unless it is among `shapes`."""
    asks = made(lambda: Scope(lambda s, x: s.c(x) * (1 + x.stride(1)), c=conv()))
    example = images(*SMALL).contiguous(memory_format=torch.channels_last)
    engine = build_engine(asks, example, shapes=[WIDE])
    assert engine.shapes == (WIDE,)
    require_answers(engine, asks, images(*WIDE).contiguous(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="strides"):
        engine(images(*WIDE))


@pytest.mark.parametrize("tactic", ["eager", "native"])
def test_shapes_share_their_weights(
    tactic: str, model: nn.Module, by_eager: dict[tuple[int, ...], str]
) -> None:
    shapes = [SMALL, WIDE, TALL]
    by_eager.update(dict.fromkeys(shapes, tactic))
    one = of_small(model, shapes=shapes[:1]).memory()
    three = of_small(model, shapes=shapes).memory()
    assert one.weights_bytes > 4 * 32 * 32 * 9
    assert three.weights_bytes == one.weights_bytes
    assert three.originals_bytes == one.originals_bytes


def test_a_layout_of_another_tactic_comes_on_top(
    model: nn.Module, by_eager: dict[tuple[int, ...], str]
) -> None:
    by_eager[WIDE] = "native"
    each = sum(of_small(model, shapes=[s]).memory().weights_bytes for s in (SMALL, WIDE))
    assert of_small(model, shapes=[SMALL, WIDE]).memory().weights_bytes == each


def test_what_it_tells_of_each_shape(model: nn.Module) -> None:
    engine = of_small(model, shapes=[SMALL, WIDE, TALL])
    assert str(engine).startswith("Engine(float32 on cpu, shapes 2x3x8x9, 2x3x8x14, 1x3x15x9; ")
    assert str(engine).endswith("ms one by one at 2x3x8x14)")
    assert "first 1x3x15x9 k32 3x3" in engine.explain(shape=TALL)
    assert "first 2x3x8x14 k32 3x3" in engine.explain() == engine.explain(2)
    assert engine.memory(shape=list(SMALL)).weights_bytes == engine.memory().weights_bytes
    with pytest.raises(ValueError, match=r"argument shape: \(9,\); .* for 2x3x8x9, 2x3x8x14, 1x3x"):
        engine.explain(shape=[9])


def test_other_batches_are_padded_within_images_of_a_shape(model: nn.Module) -> None:
    four = (4, *TALL[1:])
    engine = of_small(model, shapes=[SMALL, four], other_batches="pad")
    for shape in (SMALL, (1, *SMALL[1:]), four, (3, *TALL[1:])):
        require_answers(engine, model, images(*shape))
    with pytest.raises(ValueError, match="a batch of 3; this engine was built for 2"):
        engine(images(3, *SMALL[1:]))  # the four are of other images


class OfTheSize(nn.Module):
    """Exported at each size, its constant has the same name and another value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * torch.tensor([float(x.shape[3]), 1.0]).repeat(8).view(16, 1, 1)


def test_constants_of_shapes_are_kept_apart(tmp_path: Path) -> None:
    model = made(OfTheSize)
    engine = of_small(model, shapes=[SMALL, WIDE], other_shapes="build", max_shapes=1)
    for shape in (TALL, BEYOND, SMALL, WIDE):
        require_answers(engine, model, images(*shape))
    engine.save(tmp_path / "sizes.engine")
    for shape in engine.shapes:
        require_answers(load_engine(tmp_path / "sizes.engine"), model, images(*shape))
    assert engine._state is not None
    assert len([name for name in engine._state if ":" in name]) == 3  # that of TALL is dropped


# Shapes that calls add


def test_a_shape_is_built_when_it_is_called(model: nn.Module) -> None:
    engine = of_small(model, other_shapes="build")
    assert engine.shapes == (SMALL,)
    for shape in (WIDE, TALL, (5, *SMALL[1:])):
        require_answers(engine, model, images(*shape))
    assert engine.shapes == (SMALL, (5, *SMALL[1:]), WIDE, TALL)
    assert engine.memory().weights_bytes == of_small(model).memory().weights_bytes


def test_the_shape_not_used_for_longest_makes_room(model: nn.Module) -> None:
    engine = of_small(model, other_shapes="build", max_shapes=2)
    for shape in (WIDE, TALL, WIDE):
        engine(images(*shape))
    plan = weakref.ref(engine._built[TALL])
    engine(images(*SMALL))  # which was asked for, and always stays
    engine(images(*BEYOND))
    assert engine.shapes == (SMALL, WIDE, BEYOND)
    gc.collect()
    assert plan() is None
    for shape in (SMALL, WIDE, TALL, BEYOND):
        require_answers(engine, model, images(*shape))


def test_what_only_a_dropped_shape_has_laid_out_is_freed(
    model: nn.Module, by_eager: dict[tuple[int, ...], str]
) -> None:
    by_eager[WIDE] = "native"
    engine = of_small(model, other_shapes="build", max_shapes=1)
    before = engine.memory().weights_bytes
    for _ in range(3):
        engine(images(*WIDE))
        assert engine.memory().weights_bytes > before + 4 * 32 * 32 * 9
        engine(images(*TALL))
        gc.collect()
        assert engine.memory().weights_bytes == before


def test_shapes_are_built_with_the_engines_weights(model: nn.Module) -> None:
    trained = made(net)
    engine = of_small(trained, other_shapes="build")
    with torch.no_grad():
        trained.get_parameter("first.weight").mul_(3)
    require_answers(engine, model, images(*WIDE))
    engine.refresh(trained.state_dict())
    for shape in (SMALL, WIDE, TALL):
        require_answers(engine, trained, images(*shape))


@pytest.mark.parametrize("keep_weights", [True, False])
def test_it_needs_no_weights_for_saving(keep_weights: bool, model: nn.Module) -> None:
    engine = of_small(model, other_shapes="build", keep_weights=keep_weights)
    require_answers(engine, model, images(*WIDE))
    require_answers(engine, model, images(*SMALL))


def test_a_loaded_engine_has_the_shapes_and_builds_no_others(
    model: nn.Module, tmp_path: Path
) -> None:
    engine = of_small(model, other_shapes="build")
    engine(images(*WIDE))
    engine.save(tmp_path / "two.engine")
    loaded = load_engine(tmp_path / "two.engine")
    assert loaded.shapes == (SMALL, WIDE)
    for shape in loaded.shapes:
        assert torch.equal(loaded(images(*shape)), engine(images(*shape)))
    for shape in (BEYOND, (3, *SMALL[1:])):
        with pytest.raises(ValueError, match=r"argument x: .*, and was loaded without its model"):
            loaded(images(*shape))


def test_padding_goes_before_building(model: nn.Module) -> None:
    engine = of_small(model, other_batches="pad", other_shapes="build")
    require_answers(engine, model, images(1, *SMALL[1:]))
    assert engine.shapes == (SMALL,)
    require_answers(engine, model, images(*WIDE))
    require_answers(engine, model, images(1, *WIDE[1:]))
    assert engine.shapes == (SMALL, WIDE)


def test_a_shape_that_cannot_be_padded_is_refused() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.c(x) if x.shape[3] == SMALL[3] else s.c(x) - s.c(x).mean(0)

    engine = of_small(
        made(lambda: Scope(forward, c=conv())), other_batches="pad", other_shapes="build"
    )
    with pytest.raises(ValueError, match=r"no plan for shape \(2, 3, 8, 14\): .*'pad' is not poss"):
        engine(images(*WIDE))
    assert engine.shapes == (SMALL,)


def test_other_batches_by_the_model_go_before_building(model: nn.Module) -> None:
    engine = of_small(model, other_batches="eager", other_shapes="build")
    for shape in ((5, *SMALL[1:]), WIDE, (5, *WIDE[1:])):
        require_answers(engine, model, images(*shape))
    assert engine.shapes == (SMALL, WIDE)


@pytest.mark.parametrize(
    "shape, said",
    [
        ((2, 4, 8, 9), r"there can be no plan for shape \(2, 4, 8, 9\): argument model: Scope"),
        ((0, 3, 8, 14), r"shape \(0, 3, 8, 14\); accepted: inputs that are not empty"),
        ((0, 3, 8, 9), "a batch of 0"),
        ((3, 8, 14), r"shape \(3, 8, 14\); this engine takes inputs of 4 dimensions"),
    ],
)
def test_a_shape_that_cannot_be_built(shape: tuple[int, ...], said: str, model: nn.Module) -> None:
    engine = of_small(model, other_shapes="build")
    with pytest.raises(ValueError, match=f"argument x: {said}"):
        engine(images(*shape))
    assert engine.shapes == (SMALL,)
    require_answers(engine, model, images(*WIDE))


AROUND: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
    "meta by default": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("around", AROUND)
def test_a_shape_is_built_the_same_wherever_it_is_called(around: str, model: nn.Module) -> None:
    engine = of_small(model, other_shapes="build")
    x = images(*WIDE)
    with AROUND[around]():
        assert not engine(x).requires_grad
    assert torch.equal(engine(x), of_small(model, shapes=[WIDE])(x))


def test_an_input_of_inference_mode_is_built_for(model: nn.Module) -> None:
    engine = of_small(model, other_shapes="build")
    with torch.inference_mode():
        x = images(*WIDE).clone()
    require_answers(engine, model, x)


def test_an_engine_of_inference_mode_builds_shapes(model: nn.Module) -> None:
    with torch.inference_mode():
        engine = of_small(model, other_shapes="build")
        require_answers(engine, model, images(*WIDE))
    require_answers(engine, model, images(*TALL))


@pytest.mark.parametrize("max_shapes", [1, 8])
def test_threads_that_add_and_drop_shapes(max_shapes: int, model: nn.Module) -> None:
    engine = of_small(model, other_shapes="build", max_shapes=max_shapes)
    failures: list[BaseException] = []

    def call(first: int) -> None:
        try:
            for i in range(6):
                shape = [SMALL, WIDE, TALL, BEYOND][(first + i) % 4]
                require_answers(engine, model, images(*shape, seed=first * 10 + i))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=call, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert set(engine.shapes) >= {SMALL} and len(engine.shapes) <= 1 + max_shapes


def _in_a_child(engine: Engine, path: Path, queue: Any) -> None:
    y = engine(images(*WIDE))
    engine.refresh(engine._weights())
    engine.save(path)
    queue.put(y.sum().item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_builds_shapes(model: nn.Module, tmp_path: Path) -> None:
    """The thread that was building one at the fork is not there to let go of the lock."""
    engine = of_small(model, other_shapes="build")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(engine, tmp_path / "forked.engine", queue))
    with engine._runner.changing:
        child.start()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    assert not hangs and child.exitcode == 0
    assert queue.get(timeout=10) == pytest.approx(engine(images(*WIDE)).sum().item(), rel=1e-4)


# Bad arguments

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no shapes": ({"shapes": []}, "argument shapes: there is none"),
    "another rank": ({"shapes": [(1, 3, 8)]}, r"argument shapes: \(1, 3, 8\); accepted: 4 sizes"),
    "nothing": ({"shapes": [(1, 3, 8, 0)]}, r"argument shapes: \(1, 3, 8, 0\); accepted: 4 sizes"),
    "half a pixel": ({"shapes": [(1, 3, 8, 9.5)]}, "argument shapes: .*9.5"),
    "a flat list": ({"shapes": SMALL}, r"argument shapes: \(2,\); accepted: 4 sizes"),
    "a number": ({"shapes": 3}, "argument shapes: int; accepted: a list of shapes"),
    "both": ({"shapes": [SMALL], "batch_sizes": (1,)}, "argument shapes: given beside batch_sizes"),
    "other_shapes": ({"other_shapes": "pad"}, "argument other_shapes: 'pad'; accepted: error, bui"),
    "max_shapes": ({"max_shapes": 0}, "argument max_shapes: 0; accepted: 1 and more"),
    "max_shapes of no number": ({"max_shapes": "2"}, "argument max_shapes: '2'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments(what: str, model: nn.Module) -> None:
    options, said = BAD[what]
    with pytest.raises(ValueError, match=said) as why:
        of_small(model, **options)
    assert "\n" not in str(why.value)
