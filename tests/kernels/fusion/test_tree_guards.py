"""One check of all guards in a call: made where nothing foreign runs in between, and only there."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfuse.kernels import fuse, unfuse
from resfuse.kernels.fusion.planning.plan import plan_of
from resfuse.kernels.fusion.tracing.guards import Guards

X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) * self.scale + x)


class Foreign(nn.Module):
    """A user's own layer, which adds to the scale of blocks when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            block.scale += 0.5
        return x * 0.5


class Net(nn.Module):
    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.third = Block(), Block(), Block()
        self.stem, self.stem_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.between = nn.MaxPool2d(1) if between is None else between
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem_norm(self.stem(x)))
        x = self.third(self.second(self.between(x)))
        return self.fc(x.mean((2, 3)))


def made(between: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Net(between).eval()
    return plain, fuse(plain)


@torch.inference_mode()
def agree(plain: nn.Module, fused: nn.Module) -> None:
    for _ in range(3):
        torch.testing.assert_close(fused(X), plain(X), rtol=1e-5, atol=1e-5)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Guards]:
    """The guards that were checked."""
    found: list[Guards] = []
    hold = Guards.hold

    def counted(self: Guards) -> bool:
        found.append(self)
        return hold(self)

    monkeypatch.setattr(Guards, "hold", counted)
    return found


def test_a_call_checks_its_own_guards_and_those_of_all_within_once(checks: list[Guards]) -> None:
    plain, fused = made()
    agree(plain, fused)
    del checks[:]
    with torch.inference_mode():
        fused(X)
    assert len(checks) == 2, "the outermost scope's, and the tree's"


def test_every_scope_checks_its_own_where_foreign_code_runs(checks: list[Guards]) -> None:
    torch.manual_seed(0)
    plain = Net(Foreign()).eval()
    plain.between.blocks.append(plain.third)
    fused = fuse(plain)
    agree(plain, fused)
    del checks[:]
    with torch.inference_mode():
        fused(X)
    assert len(checks) == 4, "of the network and of three blocks"


def test_foreign_code_between_two_blocks_changes_the_second() -> None:
    torch.manual_seed(0)
    plain = Net(Foreign()).eval()
    plain.between.blocks.append(plain.second)
    fused = fuse(plain)  # a copy has a copy of the list, with its own block in it
    for _ in range(4):
        agree(plain, fused)
    assert fused.second.scale == plain.second.scale > 1


def _hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * 2


def _replace(model: nn.Module) -> None:
    torch.manual_seed(7)
    model.second = Block().eval()


def _replace_by_another_kind(model: nn.Module) -> None:
    model.between = nn.AvgPool2d(1)


def _shadow(model: nn.Module) -> None:
    model.second.forward = lambda x: x * 3


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "an attribute of a block": lambda m: setattr(m.second, "scale", 3.0),
    "a layer's stride": lambda m: setattr(m.third.conv, "padding_mode", "circular"),
    "a hook on a block": lambda m: m.second.register_forward_hook(_hook),
    "a hook before a block": lambda m: m.third.register_forward_pre_hook(lambda *a: (a[1][0] + 1,)),
    "a hook on a pool": lambda m: m.between.register_forward_hook(_hook),
    "a hook on a layer": lambda m: m.second.norm.register_forward_hook(_hook),
    "another block": _replace,
    "another pool": _replace_by_another_kind,
    "a block in training mode": lambda m: m.second.train(),
    "a norm in training mode": lambda m: m.second.norm.train(),
    "a block unfused": lambda m: unfuse(m.second),
    "a forward of its own": _shadow,
    "a new head": lambda m: setattr(m, "fc", nn.Linear(8, 3, bias=False).eval()),
    "the head's weight": lambda m: setattr(m.fc, "weight", nn.Parameter(torch.ones(3, 8))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_within_is_seen_at_the_next_call(name: str) -> None:
    plain, fused = made()
    agree(plain, fused)
    for model in (plain, fused):
        torch.manual_seed(3)
        CHANGES[name](model)
    agree(plain, fused)


def test_a_change_of_a_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = made()
    agree(plain, fused)
    monkeypatch.setattr(Block, "forward", lambda self, x: self.conv(x))
    agree(plain, fused)


def test_guards_that_hold_again_are_checked_at_once_again(checks: list[Guards]) -> None:
    plain, fused = made()
    agree(plain, fused)
    for model in (plain, fused):
        model.second.scale = 2.0
    agree(plain, fused)
    for model in (plain, fused):
        model.second.scale = 1.0
    agree(plain, fused)
    del checks[:]
    with torch.inference_mode():
        fused(X)
    assert len(checks) == 2


def test_a_block_called_by_itself_checks_its_own() -> None:
    plain, fused = made()
    agree(plain, fused)
    for model in (plain, fused):
        model.second.scale = 5.0
    agree(plain.second, fused.second)


def test_gradients_within_are_computed_by_the_layers() -> None:
    plain, fused = made()
    agree(plain, fused)
    for model in (plain, fused):
        model.requires_grad_(False)
        model.third.conv.weight.requires_grad_()
    with pytest.warns(UserWarning, match="gradients are enabled"):
        fused(X).sum().backward()
    plain(X).sum().backward()
    torch.testing.assert_close(fused.third.conv.weight.grad, plain.third.conv.weight.grad)
    assert plan_of(fused) is not None


class Twice(nn.Module):
    """Nothing to fuse itself, and a forward that may be read: calls a block, and reads a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.gain, self.times = Block(), nn.Parameter(torch.ones(1)), 2.0
        self.pool = nn.MaxPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.pool(x)) * self.gain * self.times


class Through(nn.Module):
    """A network without layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Twice(), nn.Sequential(nn.Identity(), nn.Sequential(Twice()))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def made_through() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Through().eval()
    return plain, fuse(plain)


def test_a_network_without_layers_of_its_own_is_checked_once(checks: list[Guards]) -> None:
    plain, fused = made_through()
    agree(plain, fused)
    del checks[:]
    with torch.inference_mode():
        fused(X)
    assert len(checks) == 2, "the network's, and the tree's"
    assert plan_of(fused) is not None and type(unfuse(fused)) is Through


def test_copies_of_it_are_checked_once_too(checks: list[Guards]) -> None:
    plain, fused = made_through()
    twin = copy.deepcopy(fused)
    agree(plain, twin)
    del checks[:]
    with torch.inference_mode():
        twin(X)
    assert len(checks) == 2


def _scaled(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * 3


CHANGES_BETWEEN: dict[str, Callable[[nn.Module], object]] = {
    "an attribute": lambda m: setattr(m.first, "times", 5.0),
    "an attribute within sequences": lambda m: setattr(m.second[1][0], "times", 5.0),
    "a weight it reads": lambda m: m.first.gain.data.fill_(3.0),
    "another weight": lambda m: setattr(m.first, "gain", nn.Parameter(torch.full((1,), 4.0))),
    "a hook": lambda m: m.first.register_forward_hook(_scaled),
    "a hook on a sequence": lambda m: m.second[1].register_forward_hook(_scaled),
    "one more in a sequence": lambda m: m.second[1].append(Block().eval()),
    "a forward of its own": lambda m: setattr(m.first, "forward", lambda x: x * 3),
    "another kind": lambda m: setattr(m, "first", nn.MaxPool2d(1)),
    "another pool": lambda m: setattr(m.first, "pool", nn.AvgPool2d(1)),
    "the block's scale": lambda m: setattr(m.first.block, "scale", 3.0),
}


@pytest.mark.parametrize("name", CHANGES_BETWEEN)
def test_a_change_of_what_stands_between_is_seen_at_the_next_call(name: str) -> None:
    plain, fused = made_through()
    agree(plain, fused)
    for model in (plain, fused):
        torch.manual_seed(3)
        CHANGES_BETWEEN[name](model)
    agree(plain, fused)


def test_foreign_code_in_a_network_without_layers_is_not_taken_for_known(
    checks: list[Guards],
) -> None:
    torch.manual_seed(0)
    plain = Through().eval()
    plain.second[0] = Foreign()  # type: ignore[operator, index]
    plain.second[0].blocks.append(plain.second[1][0].block)  # type: ignore[operator, index, union-attr]
    fused = fuse(plain)
    for _ in range(3):
        agree(plain, fused)
    del checks[:]
    with torch.inference_mode():
        fused(X)
    assert len(checks) == 3, "the network's, and of two blocks"


def test_a_forward_of_its_own_is_not_taken_for_its_classs() -> None:
    """It was there before the model was fused, and changes a block."""
    torch.manual_seed(0)
    plain = Through().eval()

    def forward(x: Tensor) -> Tensor:
        plain.second[1][0].block.scale += 0.5  # type: ignore[index, operator, union-attr]
        return x

    plain.second[0].forward = forward  # type: ignore[index, operator, assignment]
    fuse(plain, inplace=True)
    twin = Through().eval()
    twin.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        for _ in range(4):
            got = plain(X)
            twin.second[1][0].block.scale += 0.5  # type: ignore[index, operator, union-attr]
            torch.testing.assert_close(got, twin(X), rtol=1e-5, atol=1e-5)


def test_gradients_of_a_weight_in_between_are_not_lost() -> None:
    plain, fused = made_through()
    for model in (plain, fused):
        model.requires_grad_(False)
        model.first.gain.requires_grad_()  # type: ignore[union-attr, operator]
        for _ in range(3):
            y = model(X)
        y.square().sum().backward()
    torch.testing.assert_close(fused.first.gain.grad, plain.first.gain.grad)  # type: ignore[union-attr]
