"""torch.compile(model, backend="resfuse") with weights that change, and the graphs that inductor
gets because no engine can run them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compiled_models import (
    CLOSE,
    NO_ENGINE,
    SHAPE,
    compiled,
    net,
    noted_engines,
    require_right,
    untimed,
)
from engine_models import conv, images, made
from graphs import error
from resfuse.kernels import Engine, compile_backend
from scope import Scope

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with untimed(monkeypatch):
        yield


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    return noted_engines(monkeypatch)


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
