"""torch.compile(model, backend="resfuse"): right whatever changes, the engine's own numbers, and
inductor with a reason where there can be no engine.
"""

import functools
import gc
import os
import subprocess
import sys
import threading
import tomllib
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.utils import parametrize

from conftest import ROOT
from engine_models import conv, images, made
from graphs import error
from resfuse.kernels import Engine, build_engine, compile_backend
from resfuse.kernels.engine import build as build_module
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.planning.planner import Plan, Segment
from resfuse.kernels.engine.tactics.cpu import native
from resfuse.kernels.engine.torch_compile import compile_backend as backend_module
from scope import Scope

pytestmark = pytest.mark.slow

SHAPE = (2, 3, 8, 9)
CLOSE = 1e-5
NO_ENGINE = "inductor compiles a graph that no engine can run: "


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Iterator[None]:
    """Nothing is timed: plans are native steps where there are any. And inductor is a stand-in that
    runs the graph as it is, for it compiles C++ for seconds."""

    def planned(graph: Graph, *args: Any) -> Plan:
        found = [
            Segment([*native.segments(graph, at), Candidate("eager", at, at + 1)][0], 0.001)
            for at in range(len(graph.nodes))
        ]
        return Plan(tuple(found), 0)

    monkeypatch.setattr(build_module, "tuned_plan", planned)
    from torch._dynamo.backends import registry

    registry.lookup_backend("inductor")
    monkeypatch.setitem(registry._COMPILER_FNS, "inductor", lambda gm, inputs: gm.forward)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no engine is left out unless a test says so
        yield
    torch.compiler.reset()


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """The engines that are built from now on."""
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


# Weights that change


@torch.no_grad()
def _data(model: nn.Module) -> None:
    parameter = model.get_parameter("first.weight")
    parameter.data = parameter.data.clone() * 2


def _step(model: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer(model.parameters()).step()


def _swap(model: nn.Module) -> None:
    model.first = conv(3, 16)  # type: ignore[assignment]


def _scale(model: nn.Module) -> None:
    model.scale = torch.tensor([5.0])


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda m: m.get_parameter("first.weight").detach().mul_(2),
    "in place by data": lambda m: m.get_parameter("first.weight").data.mul_(2),
    "in numpy": lambda m: m.get_parameter("first.weight").detach().numpy().fill(0.25),
    "other data": _data,
    "another parameter": lambda m: setattr(
        m.get_submodule("first"), "weight", nn.Parameter(torch.ones(16, 3, 3, 3))
    ),
    "another layer": _swap,
    "load_state_dict": lambda m: m.load_state_dict(net().state_dict()),
    "load_state_dict by assignment": lambda m: m.load_state_dict(net().state_dict(), assign=True),
    "a step": lambda m: _step(m, lambda p: torch.optim.SGD(p, 0.1)),
    "a fused step": lambda m: _step(m, lambda p: torch.optim.Adam(p, 0.1, fused=True)),
    "statistics": lambda m: m.get_buffer("norm.running_mean").add_(1),
    "a buffer": lambda m: m.get_buffer("offset").add_(1),
    "another buffer": lambda m: setattr(m, "offset", torch.ones(16, 1, 1)),
    "a tensor in place": lambda m: m.scale.mul_(3),  # type: ignore[operator, union-attr]
    "another tensor": _scale,
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    "a parametrization": lambda m: parametrize.register_parametrization(
        m.get_submodule("first"), "weight", Doubled()
    ),
    "through a view": lambda m: m.get_parameter("head.bias").detach()[1:].fill_(7),
}


@pytest.mark.parametrize("change", CHANGES)
def test_new_weights_are_in_the_next_answer(change: str) -> None:
    model, x = made(net), images(*SHAPE)
    fast = compiled(model)
    for _ in range(2):
        require_right(fast, model, x)
    with torch.no_grad():
        before = model(x)
    CHANGES[change](model)
    with torch.no_grad():
        assert change == "channels_last" or error(model(x), before) > 1e-3
    for _ in range(2):
        require_right(fast, model, x)


MEAN = torch.tensor([0.5])


def test_tensors_of_globals_and_closures_are_weights(engines: list[Engine]) -> None:
    deviation = torch.tensor([2.0])
    model = made(lambda: Scope(lambda s, x: s.c((x - MEAN) / deviation), c=conv()))
    fast, x = compiled(model), images(*SHAPE)
    for _ in range(2):
        require_right(fast, model, x)
        MEAN.mul_(1.5)
        require_right(fast, model, x)
        deviation += 1
    assert len(engines) == 1


def test_new_weights_plan_nothing_anew(engines: list[Engine]) -> None:
    model, x = made(net), images(*SHAPE)
    fast = compiled(model)
    for _ in range(3):
        require_right(fast, model, x)
        with torch.no_grad():
            model.get_parameter("first.weight").mul_(1.5)
    assert len(engines) == 1


def test_weights_that_an_engine_cannot_have_run_by_torch() -> None:
    model, x = made(net), images(*SHAPE)
    fast = compiled(model)
    require_right(fast, model, x)
    kept = model.get_parameter("first.weight").detach().clone()
    with torch.no_grad():
        model.get_parameter("first.weight")[0] = torch.nan
        with pytest.warns(UserWarning, match="operation by operation, by torch: first.weight hold"):
            assert fast(x).isnan().all() == model(x).isnan().all()
        assert fast(x).isnan().any()  # and says so once
        model.get_parameter("first.weight").copy_(kept)
    require_right(fast, model, x)


def test_a_refresh_that_breaks_off_leaves_no_old_numbers(
    engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = made(net), images(*SHAPE)
    fast = compiled(model)
    require_right(fast, model, x)

    def out_of_memory(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with torch.no_grad():
        model.get_parameter("first.weight").mul_(2)
        with monkeypatch.context() as patch:
            patch.setattr(engines[0], "refresh", out_of_memory)
            with pytest.raises(RuntimeError, match="out of memory"):
                fast(x)
    require_right(fast, model, x)


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_a_number_read_from_a_weight_is_not_kept() -> None:
    model = made(lambda: Scope(lambda s, x: s.c(x) * s.factor.item(), c=conv()))
    model.factor = torch.tensor(2.0)
    fast, x = compiled(model), images(*SHAPE)
    with pytest.warns(UserWarning, match=NO_ENGINE):
        require_right(fast, model, x)
    model.factor.mul_(3)
    require_right(fast, model, x)


def test_a_weight_that_needs_gradients_again() -> None:
    """Recorded gradients are never dropped."""
    model, x = made(net).requires_grad_(False), images(*SHAPE)
    fast = compiled(model)
    fast(x)
    model.get_parameter("head.bias").requires_grad_(True)
    with pytest.warns(UserWarning, match="gradients are recorded"):
        y = fast(x)
    y.sum().backward()
    assert model.get_parameter("head.bias").grad is not None
    with torch.no_grad():
        assert error(y, model(x)) < CLOSE


# What inductor gets


def _two(s: Any, x: Tensor, y: Tensor) -> Tensor:
    return s.c(x) + y


def _counts(s: Any, x: Tensor) -> Tensor:
    s.calls.add_(1)
    return s.c(x)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = conv()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c(x) + y


def _counting() -> nn.Module:
    model = Scope(_counts, c=conv())
    model.register_buffer("calls", torch.zeros(1))
    return model


def _drawing() -> nn.Module:
    return Scope(lambda s, x: s.c(x) + torch.rand_like(x[:, :1]), c=conv())


def _plain() -> nn.Module:
    return nn.Sequential(conv(), nn.BatchNorm2d(16))


def _casting(s: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = s.c(x)
    return y.float()


X = images(*SHAPE)
UNSUITABLE: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], str]] = {
    "two inputs": (Two, (X, images(2, 16, 8, 9)), "it takes 2 tensors; an engine takes one"),
    "a buffer that is written": (_counting, (X,), "it writes to calls, as batch norms do"),
    "float64": (lambda: _plain().double(), (X.double(),), "its input is torch.float64"),
    "integers": (
        lambda: Scope(lambda s, x: s.c(x.float()), c=conv()), (X.to(torch.uint8),),
        "its input is torch.uint8",
    ),
    "random numbers": (_drawing, (X,), "it draws random numbers"),
    "writes its input": (
        lambda: Scope(lambda s, x: s.c(x.mul_(1)), c=conv()), (X,), "it writes to x",
    ),
    "no input": (
        lambda: Scope(lambda s, x: s.c(torch.ones(SHAPE)), c=conv()), (X,),
        "it takes no tensors; an engine takes one",
    ),
    "a region of autocast": (
        lambda: Scope(_casting, c=conv()), (X,), "it cannot be exported: .*dtype",
    ),
    "a view of the input": (
        lambda: Scope(lambda s, x: (s.c(x), x.flatten(1)), c=conv()), (X,),
        "it returns a view of its input or of a weight",
    ),
    "a view of a weight": (
        lambda: Scope(lambda s, x: (s.c(x), s.c.bias[1:]), c=conv()), (X,),
        "it returns a view of its input or of a weight",
    ),
    "a view of another result": (
        lambda: Scope(lambda s, x: ((y := s.c(x)), y.flatten(1)), c=conv()), (X,),
        "two of its results share their memory",
    ),
    "a weight that is NaN": (
        lambda: nn.Sequential(conv()).apply(
            lambda m: nn.init.constant_(m.bias, torch.nan) if isinstance(m, nn.Conv2d) else None
        ), (X,), r"0\.bias holds values that are not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", UNSUITABLE)
def test_what_no_engine_takes_goes_to_inductor(what: str, engines: list[Engine]) -> None:
    factory, inputs, said = UNSUITABLE[what]
    model = made(factory)
    fast = compiled(model)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=f"{NO_ENGINE}({said})") as found:
            torch.manual_seed(0)
            got = fast(*inputs)
        torch.manual_seed(0)
        torch.testing.assert_close(got, model(*inputs), equal_nan=True)
        fast(*inputs)
    assert len(found) == 1 and "\n" not in str(found[0].message)


def test_gradients_go_to_inductor() -> None:
    model, x = made(net), images(*SHAPE)
    fast = compiled(model)
    with pytest.warns(UserWarning, match=f"{NO_ENGINE}gradients are recorded; call it under"):
        fast(x).sum().backward()
    assert model.get_parameter("first.weight").grad is not None
    require_right(fast, model, x)  # without them there is an engine


def test_training_mode_goes_to_inductor(engines: list[Engine]) -> None:
    model, x = made(net), images(*SHAPE)
    fast = compiled(model)
    require_right(fast, model, x)
    before = model.get_buffer("norm.running_mean").clone()
    with torch.no_grad(), pytest.warns(UserWarning, match=f"{NO_ENGINE}it .*call model.eval"):
        fast(model.train() and x)
    assert not torch.equal(model.get_buffer("norm.running_mean"), before)
    require_right(fast, model.eval(), x)
    assert len(engines) == 1


def test_dropout_in_training_mode_goes_to_inductor() -> None:
    model, x = made(lambda: nn.Sequential(conv(), nn.Dropout())).train(), images(*SHAPE)
    with torch.no_grad(), pytest.warns(UserWarning, match=f"{NO_ENGINE}it draws random numbers"):
        assert (compiled(model)(x) == 0).float().mean() > 0.3


def test_autocast_goes_to_inductor() -> None:
    model, x = made(net), images(*SHAPE)
    fast = compiled(model)
    require_right(fast, model, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match=f"{NO_ENGINE}it runs under autocast"):
            got = fast(x)
        assert torch.equal(got, model(x))
    require_right(fast, model, x)


def test_inductor_itself_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with no stand-in: the smallest graph."""
    monkeypatch.undo()
    fast = torch.compile(lambda x, y: x + 2 * y, backend=compile_backend)
    with pytest.warns(UserWarning, match="it takes 2 tensors"):
        assert torch.equal(fast(torch.ones(3), torch.ones(3)), torch.full((3,), 3.0))


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
