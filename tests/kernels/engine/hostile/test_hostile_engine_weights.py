"""What people do to weights: train on, load others, tie them, break them. An engine's own stay what
they were, or a sentence says what it cannot take.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_models import conv, images, made
from graphs import error
from hostile_engine import SHAPE, mixed, require_same, train_on
from resfuse.kernels import Engine, build_engine
from resfuse.kernels.engine.load import load_engine
from scope import Scope

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(timings: Path) -> Engine:
    return build_engine(made(mixed), images(*SHAPE), timings=timings)


@pytest.mark.parametrize("keep_weights", [True, False])
@pytest.mark.parametrize("batch", [2, 5])
def test_a_model_that_trains_on_changes_nothing(
    batch: int, keep_weights: bool, timings: Path
) -> None:
    model, x = made(mixed), images(batch, *SHAPE[1:])
    engine = build_engine(
        model, images(*SHAPE), other_batches="eager", keep_weights=keep_weights, timings=timings
    )
    before = engine(x)
    train_on(model)
    assert torch.equal(engine(x), before)
    with torch.no_grad():
        assert error(model(x), before) > 0.1


def test_save_writes_the_weights_that_run(timings: Path, tmp_path: Path) -> None:
    model, x = made(mixed), images(*SHAPE)
    engine = build_engine(model, x, timings=timings)
    before = engine(x)
    train_on(model)
    engine.save(tmp_path / "mixed.engine")
    assert torch.equal(load_engine(tmp_path / "mixed.engine")(x), before)


def test_what_was_loaded_by_refresh_may_train_on(timings: Path) -> None:
    other, x = made(mixed), images(5, *SHAPE[1:])
    train_on(other)
    engine = build_engine(made(mixed), images(*SHAPE), other_batches="eager", timings=timings)
    engine.refresh(dict(other.named_parameters()) | dict(other.named_buffers()))
    before = engine(x), engine(x[:2])
    require_same(engine, other, x)
    train_on(other)
    assert torch.equal(engine(x), before[0]) and torch.equal(engine(x[:2]), before[1])


def test_tied_weights_are_copied_once(timings: Path) -> None:
    def tied() -> nn.Module:
        model = Scope(lambda s, x: s.b(s.a(x)), a=nn.ConvTranspose2d(3, 3, 33), b=nn.Identity())
        model.b = nn.ConvTranspose2d(3, 3, 33)
        model.b.weight = model.a.weight
        return model

    model = made(tied)
    engine = build_engine(model, images(1, 3, 4, 4), timings=timings)
    require_same(engine, model, images(1, 3, 4, 4))
    assert engine.memory().originals_bytes < 1.5 * 4 * 9 * 33 * 33


# Infinite and broken weights


class Masked(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.c = conv()
        mask = torch.full((90, 90), -torch.inf).triu(1)
        if kind == "parameter":
            self.mask: Tensor = nn.Parameter(mask, requires_grad=False)
        else:
            self.register_buffer("mask", mask, persistent=kind == "persistent")

    def forward(self, x: Tensor) -> Tensor:
        t = self.c(x).flatten(2).transpose(1, 2)
        return (t @ t.transpose(1, 2) + self.mask).softmax(-1) @ t


@pytest.mark.parametrize("kind", ["persistent", "not persistent", "parameter"])
def test_masks_of_infinity(kind: str, timings: Path, tmp_path: Path) -> None:
    model, x = made(lambda: Masked(kind)), images(*SHAPE)
    engine = build_engine(model, x, timings=timings)
    engine.refresh(model.state_dict())
    require_same(engine, model, x)
    engine.save(tmp_path / "masked.engine")
    require_same(load_engine(tmp_path / "masked.engine"), model, x)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["0.weight", "1.running_mean", "2.weight"])
def test_what_would_be_folded_must_be_finite(number: float, name: str, timings: Path) -> None:
    model = made(mixed)
    model.state_dict()[name].view(-1)[0] = number
    with pytest.raises(
        ValueError, match=f"argument model: {name} holds values that are not finite"
    ):
        build_engine(model, images(*SHAPE), timings=timings)


@pytest.mark.parametrize("variance", [-1.0, -1e-5])
def test_a_variance_below_zero_is_refused(variance: float, timings: Path) -> None:
    model = made(mixed)
    model.get_buffer("1.running_var")[3] = variance
    with pytest.raises(ValueError, match=r"1\.running_var holds variances"):
        build_engine(model, images(*SHAPE), timings=timings)


# Refresh

NO_STATE: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a module": (lambda m: m, "Sequential; accepted: what model.state_dict"),
    "None": (lambda m: None, "NoneType; accepted"),
    "a list": (lambda m: list(m.state_dict().items()), "list; accepted"),
    "arrays": (lambda m: {k: v.numpy() for k, v in m.state_dict().items()}, "is ndarray; accepted"),
    "a checkpoint": (lambda m: {"state_dict": m.state_dict()}, "'state_dict' may hold"),
    "prefixes": (lambda m: {f"module.{k}": v for k, v in m.state_dict().items()}, "is missing"),
    "sparse": (
        lambda m: {k: v.to_sparse() for k, v in m.state_dict().items()}, "is torch.sparse_coo",
    ),
    "meta": (lambda m: m.to("meta").state_dict(), "on meta, which has no numbers"),
    "fake": (
        lambda m: {k: torch._subclasses.FakeTensorMode().from_tensor(v)
                   for k, v in m.state_dict().items()}, "accepted: dense tensors",
    ),
    "complex": (
        lambda m: {k: v.to(torch.complex64) for k, v in m.state_dict().items()}, "torch.complex64",
    ),
    "quantized": (
        lambda m: {k: torch.quantize_per_tensor(v.float(), 0.1, 0, torch.qint8)
                   for k, v in m.state_dict().items()}, "a quantized tensor",
    ),
    "out of range": (
        lambda m: {k: v.double() * 1e200 for k, v in m.state_dict().items()}, "not finite",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", NO_STATE)
def test_refresh_refuses_before_anything_changes(name: str, engine: Engine) -> None:
    make, said = NO_STATE[name]
    x = images(*SHAPE)
    before = engine(x)
    with pytest.raises(ValueError, match=f"argument state_dict: .*{said}") as refusal:
        engine.refresh(make(made(mixed)))
    assert "\n" not in str(refusal.value)
    assert torch.equal(engine(x), before)


@pytest.mark.parametrize("change", [
    lambda state: {k: v.double() for k, v in state.items()},
    lambda state: state | {"more": torch.ones(1)},
    lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    lambda state: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()},
])  # fmt: skip
def test_refresh_takes_what_load_state_dict_would(change: Any, timings: Path) -> None:
    other, x = made(mixed), images(*SHAPE)
    train_on(other)
    engine = build_engine(made(mixed), x, timings=timings)
    engine.refresh(change(other.state_dict()))
    require_same(engine, other, x)
