"""What is changed after fuse, on the model and around it, is followed."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile import (
    Act,
    Block,
    Settings,
    images,
    is_fused,
    pair_of,
    plans_run,
    require_alike,
    spread,
)
from resfuse.kernels import fuse
from scope import Scope

torch.manual_seed(3)
PROJECTION = nn.Conv2d(8, 8, 1)


def block() -> nn.Module:
    return Block()


def test_such_a_block_is_fused() -> None:
    assert is_fused(pair_of(block)[1])


CHANGES: dict[str, Act] = {
    "a switch": lambda m: setattr(m, "residual", False),
    "a number": lambda m: setattr(m, "scale", 3.0),
    "the structure": lambda m: setattr(m, "pair", True),
    "a name": lambda m: setattr(m, "mode", "other"),
    "an entry of a list": lambda m: m.steps.__setitem__(0, 5.0),
    "a longer list": lambda m: m.steps.append(0.5),
    "an entry of a dict": lambda m: m.options.update(gain=0.25),
    "another dict": lambda m: setattr(m, "options", {"gain": 0.5}),
    "an attribute of an object": lambda m: setattr(m.settings, "gain", 2.0),
    "another object": lambda m: setattr(m, "settings", _settings(7.0)),
    "a child where none was": lambda m: setattr(m, "downsample", PROJECTION),
    "an attribute shadows its class's": lambda m: setattr(m, "slope_of_class", 2.0),
    "a method of the instance": lambda m: setattr(m, "forward", lambda x: x * 2),
    "eps": lambda m: setattr(m.bn, "eps", 0.5),
    "stride": lambda m: (setattr(m.conv, "stride", (2, 2)), setattr(m, "residual", False)),
    "padding": lambda m: (setattr(m.conv, "padding", (0, 0)), setattr(m, "residual", False)),
    "dilation": lambda m: (setattr(m.conv, "dilation", (2, 2)), setattr(m, "residual", False)),
    "padding mode": lambda m: setattr(m.conv, "padding_mode", "circular"),
    "a convolution's own method": lambda m: setattr(m.conv, "_conv_forward", lambda x, w, b: x),
    "a layer's own forward": lambda m: setattr(m.relu, "forward", lambda x: x * 0.5),
    "another activation": lambda m: setattr(m, "relu", nn.Tanh()),
    "a norm that is none": lambda m: setattr(m, "bn", nn.Identity()),
    "a layer of another class": lambda m: setattr(m.relu, "__class__", nn.Sigmoid),
    "a norm in training mode": lambda m: m.bn.train(),
    "a norm without gamma": lambda m: setattr(m.bn, "weight", None),
    "a hook": lambda m: m.bn.register_forward_hook(lambda *_: _[2] * 2) and None,
    "a pre-hook": lambda m: m.relu.register_forward_pre_hook(lambda _, x: (x[0] + 1,)) and None,
    "a kernel's hook of the conv": lambda m: m.conv.register_forward_hook(
        lambda *_: torch.zeros_like(_[2])
    )
    and None,
    "nothing that matters": lambda m: setattr(m, "note", [1, 2]),
}  # fmt: skip


def _settings(gain: float) -> Settings:
    settings = Settings()
    settings.gain = gain
    return settings


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_followed(what: str) -> None:
    plain, fused = pair_of(block)
    for model in (plain, fused):
        CHANGES[what](model)
    require_alike(plain, fused)


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_inside_a_sequence_is_followed(what: str) -> None:
    """Blocks in a row are run past their `__call__`."""
    plain, fused = pair_of(lambda: nn.Sequential(Block(), Block(), Block()))
    for model in (plain, fused):
        CHANGES[what](model[1])
        model[1].pair = False
    require_alike(plain, fused)


@pytest.mark.parametrize("what", ["a switch", "eps", "a longer list", "another activation"])
def test_a_change_in_the_middle_of_a_forward_is_followed(what: str) -> None:
    """The outer module's plan runs when the inner one's has to be looked at again."""
    plain, fused = pair_of(lambda: nn.Sequential(Block(), Block()))
    for model in (plain, fused):
        model[0].register_forward_hook(
            lambda m, a, y, block=model[1]: CHANGES[what](block) and None
        )
    require_alike(plain, fused)


def test_a_change_that_is_taken_back_is_fused_again() -> None:
    plain, fused = pair_of(block)
    for scale, runs in ((2.0, 0), (1.0, 1)):
        fused.scale = plain.scale = scale
        require_alike(plain, fused)
        assert plans_run(fused) == runs


def test_what_does_not_matter_costs_nothing() -> None:
    fused = pair_of(block)[1]
    fused.note, fused.bn.note, fused.conv.total_ops = "mine", "too", 3
    assert plans_run(fused) == 1


GAIN = 1.0
TABLE = {"gain": 1.0}


def _by_global(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.conv(x)) * GAIN)


def _by_table(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.conv(x)) * TABLE["gain"])


def _by_helper(m: Any, x: Tensor) -> Tensor:
    return _finish(m.bn(m.conv(x)))


def _finish(y: Tensor) -> Tensor:
    return F.relu(y) * GAIN


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"conv": nn.Conv2d(8, 8, 3, padding=1), "bn": nn.BatchNorm2d(8), "relu": nn.ReLU()}


@pytest.mark.parametrize("forward", [_by_global, _by_table, _by_helper])
def test_globals_are_followed(forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = pair_of(lambda: Scope(forward, **layers()))
    assert is_fused(fused)
    monkeypatch.setitem(globals(), "GAIN", 3.0)
    require_alike(plain, fused)
    monkeypatch.setitem(TABLE, "gain", 4.0)
    require_alike(plain, fused)
    monkeypatch.setitem(globals(), "_finish", torch.sigmoid)
    require_alike(plain, fused)


def test_closures_are_followed() -> None:
    gain = 1.0

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.relu(m.bn(m.conv(x)) * gain)

    plain, fused = pair_of(lambda: Scope(forward, **layers()))
    assert is_fused(fused)
    gain = 5.0
    require_alike(plain, fused)


def test_classes_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = pair_of(block)
    monkeypatch.setattr(Block, "slope_of_class", 3.0)
    require_alike(plain, fused)
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: x * 2)
    require_alike(plain, fused)
    monkeypatch.undo()
    require_alike(plain, fused)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, w, b: x + 1)
    require_alike(plain, fused)
    monkeypatch.undo()
    monkeypatch.setattr(Block, "other", lambda self, y: y)
    require_alike(plain, fused)
    monkeypatch.setattr(Block, "forward", lambda self, x: x)
    require_alike(plain, fused)


def test_a_slope_and_a_pool_are_followed() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Scope(
            lambda m, x: m.pool(m.relu(m.bn(m.conv(x)))),
            conv=nn.Conv2d(3, 16, 7, 2, 3), bn=nn.BatchNorm2d(16), relu=nn.ReLU(),
            pool=nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip

    x = images(shape=(1, 3, 32, 30))
    changes: list[Act] = [
        lambda m: setattr(m.pool, "padding", 0),
        lambda m: setattr(m.pool, "stride", 1),
        lambda m: setattr(m.pool, "ceil_mode", True),
        lambda m: setattr(m, "pool", nn.Identity()),
        lambda m: setattr(m, "relu", nn.LeakyReLU(0.5)),
        lambda m: setattr(m, "pool", nn.AvgPool2d(2)),
        lambda m: setattr(m.relu, "inplace", True),
    ]
    for change in changes:
        plain = spread(make())
        fused = fuse(plain)
        require_alike(plain, fused, x)
        for model in (plain, fused):
            change(model)
        require_alike(plain, fused, x)


def test_dropout_and_drop_path_by_name_only() -> None:
    """A class of that name that does something in eval mode is run; one that does not is left out,
    until its switch says otherwise."""

    class DropPath(nn.Module):
        def __init__(self, always: bool) -> None:
            super().__init__()
            self.always = always

        def forward(self, x: Tensor) -> Tensor:
            return x * 0.5 if self.always or self.training else x

    class MonteCarlo(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0.25

    for drop in (DropPath(True), DropPath(False), MonteCarlo()):
        plain, fused = pair_of(
            lambda drop=drop: Scope(
                lambda m, x: m.relu(m.drop(m.bn(m.conv(x))) + x), drop=drop, **layers()
            )
        )
        require_alike(plain, fused)
        for model in (plain, fused):
            model.drop.always = True
        require_alike(plain, fused)


def test_a_frozen_norm_of_ones_own_is_run() -> None:
    class FrozenBatchNorm2d(nn.Module):
        """DETR's has no eps; this one has no variance."""

        def __init__(self) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(8) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight[:, None, None] + self.bias[:, None, None]

    plain, fused = pair_of(
        lambda: Scope(
            lambda m, x: m.relu(m.bn(m.conv(x))), **(layers() | {"bn": FrozenBatchNorm2d()})
        )
    )
    require_alike(plain, fused)


def test_a_new_head_keeps_the_stem_fused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.fc = nn.Sequential(*layers().values()), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.stem(x).mean((2, 3)))

    plain, fused = pair_of(Net)
    head = nn.Linear(8, 5)
    for model in (plain, fused):
        model.fc = head
    require_alike(plain, fused)
    assert plans_run(fused) == 1
    for model in (plain, fused):
        model.fc = nn.Identity()
    require_alike(plain, fused)


class Nested(nn.Module):
    """Fused children, a layer between them that takes any memory format, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between = nn.Sequential(Block(), Block()), nn.ReLU6()
        self.second, self.third = Block(), nn.Sequential(Block(), Block())
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.between(self.first(self.bn(self.conv(x))))))


@pytest.mark.parametrize("name", ["first", "first.1", "between", "second", "third", "third.0"])
@pytest.mark.parametrize("asks", [False, True])
def test_a_child_gets_a_forward_of_its_own(name: str, asks: bool) -> None:
    plain, fused = pair_of(Nested)
    for model in (plain, fused):
        child = model.get_submodule(name)

        def forward(x: Tensor, old: Any = child.forward) -> Any:
            return old(x) * (x.stride(1) if asks else 3)

        child.forward = forward
    require_alike(plain, fused)


def test_a_stride_that_padding_same_does_not_have() -> None:
    """torch refuses to run it."""

    def strided() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(8, 16, 3, padding="same"), nn.BatchNorm2d(16), nn.ReLU())
        model[0].stride = (2, 2)
        return model

    require_alike(*pair_of(strided))


def test_other_data_in_a_weight_of_inference_mode() -> None:
    """It is no inference tensor any more, says torch, but has no count of writes either."""
    plain, fused = pair_of(lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)))
    for model in (plain, fused):
        with torch.inference_mode():
            model[0].weight = nn.Parameter(model[0].weight * 1.5, requires_grad=False)
        model.double()
    require_alike(plain, fused, images().double())
    for model in (plain, fused):
        model[0].weight.data.mul_(2)
    require_alike(plain, fused, images().double())
