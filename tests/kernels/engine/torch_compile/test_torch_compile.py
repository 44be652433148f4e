"""torch.compile(model, backend="resfuse"): the engine's own numbers, for which sizes, with which
options, and its name.
"""

import gc
import os
import subprocess
import sys
import threading
import tomllib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from compiled_models import (
    CLOSE,
    SHAPE,
    compiled,
    net,
    noted_engines,
    require_right,
    untimed,
)
from conftest import ROOT
from engine_models import conv, images, made
from graphs import error
from resfuse.kernels import Engine, build_engine, compile_backend
from scope import Scope

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with untimed(monkeypatch):
        yield


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    return noted_engines(monkeypatch)


# What it answers


def test_it_answers_what_the_engine_answers(engines: list[Engine]) -> None:
    model, x = made(net), images(*SHAPE)
    with torch.no_grad():
        got = compiled(model)(x)
    assert torch.equal(got, build_engine(model, x)(x))
    (engine,) = engines
    assert torch.equal(got, engine(x)[0]) and "native" in engine.explain()
    require_right(compiled(model), model, x)


def test_each_shape_has_an_engine(engines: list[Engine]) -> None:
    model = made(net)
    fast = compiled(model)
    for shape in (SHAPE, (3, *SHAPE[1:]), (3, 3, 11, 12), SHAPE, (3, 3, 11, 12), (1, 3, 8, 8)):
        require_right(fast, model, images(*shape))
    assert [engine.shapes for engine in engines] == [
        (SHAPE,), ((3, *SHAPE[1:]),), ((3, 3, 11, 12),), ((1, 3, 8, 8),)
    ]  # fmt: skip


def test_one_engine_builds_the_shapes_that_dynamo_leaves_free(engines: list[Engine]) -> None:
    model = made(net)
    fast = torch.compile(
        model, backend=compile_backend, dynamic=True,
        options={"other_shapes": "build", "max_shapes": 2},
    )  # fmt: skip
    shapes = [SHAPE, (3, *SHAPE[1:]), (3, 3, 11, 12), (4, 3, 12, 14), SHAPE, (3, 3, 11, 12)]
    for shape in shapes:
        require_right(fast, model, images(*shape))
    (engine,) = engines
    assert engine.shapes == (SHAPE, (3, 3, 11, 12), (4, 3, 12, 14))


def test_numbers_of_a_model_may_change(engines: list[Engine]) -> None:
    """Dynamo hands them over as tensors where all may change."""
    model = made(lambda: Scope(lambda s, x: s.c(x) * s.factor, c=conv()))
    fast = torch.compile(model, backend=compile_backend, dynamic=True)
    for factor in (2.5, 3.5, 2.5):
        model.factor = factor  # type: ignore[assignment]
        require_right(fast, model, images(*SHAPE))
    assert len(engines) == 2


def test_other_batches_are_padded_where_dynamo_leaves_the_batch_free(
    engines: list[Engine],
) -> None:
    model = made(net)
    fast = compiled(model, other_batches="pad", batch_sizes=(1, 6))
    for count in (2, 3, 4, 6):
        require_right(fast, model, images(count, *SHAPE[1:]))
    assert [engine.batch_sizes for engine in engines] == [(2,), (1, 6)]
    require_right(fast, model, images(7, *SHAPE[1:]))  # more than are built for: one of its own
    assert [engine.batch_sizes for engine in engines][2:] == [(7,)]


def test_other_batches_run_as_the_model_does(engines: list[Engine]) -> None:
    model = made(net)
    fast = compiled(model, other_batches="eager")
    for count in (2, 3, 5, 4):
        require_right(fast, model, images(count, *SHAPE[1:]))
    assert [engine.batch_sizes for engine in engines] == [(2,), (3,)]
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(2)
    require_right(fast, model, images(5, *SHAPE[1:]))


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
def test_outputs_have_the_strides_of_eager(
    weights: torch.memory_format, given: torch.memory_format
) -> None:
    """Dynamo has told the code behind the graph which they are."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.c(x)
        torch._dynamo.graph_break()
        return y.permute(0, 2, 3, 1).reshape(-1) if y.is_contiguous() else y

    model = made(lambda: Scope(forward, c=conv())).to(memory_format=weights)
    fast = compiled(model)
    x = images(*SHAPE).contiguous(memory_format=given)
    require_right(fast, model, x)
    whole = made(lambda: nn.Sequential(conv(), nn.ReLU())).to(memory_format=weights)
    require_right(compiled(whole), whole, x)


def test_each_graph_between_breaks_has_an_engine(engines: list[Engine]) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.first(x).relu()
        torch._dynamo.graph_break()
        return s.second(y)

    model = made(lambda: Scope(forward, first=conv(), second=conv(16, 16)))
    require_right(compiled(model), model, images(*SHAPE))
    assert len(engines) == 2


def test_several_outputs_in_containers(engines: list[Engine]) -> None:
    def forward(s: Any, x: Tensor) -> Any:
        y = s.c(x)
        return {"maps": [y, y.relu()], "sizes": (x.shape[2], "text")}

    model = made(lambda: Scope(forward, c=conv()))
    x = images(*SHAPE)
    with torch.no_grad():
        got, want = compiled(model)(x), model(x)
    assert got["sizes"] == (8, "text") and len(engines) == 1
    for y, plain in zip(got["maps"], want["maps"], strict=True):
        assert error(y, plain) < CLOSE


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(around: Callable[[], Any], engines: list[Engine]) -> None:
    model, x = made(net), images(*SHAPE)
    fast = compiled(model)
    for _ in range(2):
        with around():
            y = fast(x)
        assert not y.requires_grad and len(engines) == 1
    assert torch.equal(y, engines[0](x)[0])


def test_weights_without_gradients_need_no_mode(engines: list[Engine]) -> None:
    model, x = made(net).requires_grad_(False), images(*SHAPE)
    assert error(compiled(model)(x), model(x)) < CLOSE and len(engines) == 1


def test_threads_share_a_compiled_model() -> None:
    model = made(net)
    fast = compiled(model)
    require_right(fast, model, images(*SHAPE))
    failures: list[BaseException] = []

    def call(seed: int) -> None:
        try:
            for i in range(5):
                require_right(fast, model, images(*SHAPE, seed=10 * seed + i))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_model_that_is_gone_is_let_go_of() -> None:
    model = made(net)
    weight = weakref.ref(model.get_parameter("first.weight"))
    fast = compiled(model)
    require_right(fast, model, images(*SHAPE))
    del model, fast
    torch.compiler.reset()
    gc.collect()
    assert weight() is None


# Options


def test_options_reach_the_engine(engines: list[Engine], tmp_path: Path) -> None:
    model = made(net)
    require_right(compiled(model, threads=1, timings=tmp_path), model, images(*SHAPE))
    assert engines[0].threads == 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"treads": 1}, r"argument options: 'treads' is not known; did you mean threads\?;"),
    "nothing near": ({"x": 1}, "argument options: 'x' is not known; accepted: batch_sizes, other_"),
    "what calls say": ({"shapes": [SHAPE]}, "argument options: 'shapes' is not known"),
    "needed": ({"keep_weights": False}, "argument options: 'keep_weights' is not known"),
    "value": ({"other_batches": "no"}, "argument other_batches: 'no'; accepted: error, pad, eager"),
    "a number for a list": (
        {"batch_sizes": 3},
        "argument batch_sizes: int; accepted: a list of nu",
    ),
    "threads": ({"threads": 0}, "argument threads: 0; accepted"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options(what: str) -> None:
    options, said = BAD[what]
    with torch.no_grad(), pytest.raises(Exception, match=said):
        compiled(made(net), **options)(images(*SHAPE))


def test_a_mode_is_refused() -> None:
    fast = torch.compile(made(net), backend=compile_backend, mode="max-autotune")
    with torch.no_grad(), pytest.raises(Exception, match="argument mode: 'max-autotune'; an eng"):
        fast(images(*SHAPE))


# Its name


def test_torch_finds_it_by_its_name(tmp_path: Path) -> None:
    """By the entry points that an installation writes from pyproject.toml."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"{name} = {value}" for name, value in points["torch_dynamo_backends"].items()]
    about = tmp_path / "resfuse_named-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: resfuse-named\nVersion: 1\n")
    (about / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines, ""]))
    script = (
        "import sys, torch\n"
        "assert 'resfuse' in torch.compiler.list_backends()\n"
        "fast = torch.compile(lambda x: x.relu(), backend='resfuse')\n"
        "assert torch.equal(fast(-torch.ones(2, 3, 4, 4)), torch.zeros(2, 3, 4, 4))\n"
        "assert 'resfuse.kernels.engine.engine' in sys.modules\n"
    )
    path = os.pathsep.join([str(tmp_path), *(part for part in sys.path if part)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
