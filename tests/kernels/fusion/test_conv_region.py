"""Convolutions of a fused forward that one native call runs."""

import copy
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from resfuse.kernels import fuse
from resfuse.kernels.cpu.conv_program import ConvProgram
from resfuse.kernels.cpu.library import why_unavailable
from resfuse.kernels.cpu.packed_conv import NativeConv
from resfuse.kernels.ops.conv_problem import Geometry
from resfuse.resnet_ref import create


@pytest.fixture(scope="module", autouse=True)
def _native() -> None:
    """Here, and not while tests are collected, the library is compiled where there is none yet."""
    if (reason := why_unavailable()) is not None:
        pytest.skip(reason)


class Inverted(nn.Module):
    """MobileNetV2's inverted residual, with a number of channels that fills no vector."""

    def __init__(self, c: int = 24, narrow: int = 24) -> None:
        super().__init__()
        wide = 6 * 16
        self.expand, self.bn1 = nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.project, self.bn3 = nn.Conv2d(wide, narrow, 1, bias=False), nn.BatchNorm2d(narrow)
        self.relu, self.adds = nn.ReLU6(), c == narrow

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.expand(x)))
        y = self.relu(self.bn2(self.depthwise(y)))
        y = self.bn3(self.project(y))
        return x + y if self.adds else y


class Gate(nn.Module):
    """Squeeze-and-excitation, which is more than convolutions."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(c, 8, 1), nn.Conv2d(8, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return torch.sigmoid(self.excite(scale)) * x


class Gated(Inverted):
    """EfficientNet's block: a gate between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate(6 * 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.expand(x)))
        y = self.gate(self.relu(self.bn2(self.depthwise(y))))
        return x + self.bn3(self.project(y))


class Branches(nn.Module):
    """Two results, one of which is read again: both leave the region."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.norms[0](self.first(x)))
        b = torch.relu(self.norms[1](self.second(a)))
        return torch.cat([a, b, x], 1)


class Backbone(nn.Module):
    """Layers of its own before and behind blocks."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.blocks = nn.ModuleList(Inverted() for _ in range(blocks))
        self.head, self.norm = nn.Conv2d(24, 48, 1), nn.BatchNorm2d(48)

    def __getitem__(self, i: int) -> nn.Module:
        return self.blocks[i]

    def __setitem__(self, i: int, block: nn.Module) -> None:
        self.blocks[i] = block

    def append(self, block: nn.Module) -> None:
        self.blocks.append(block)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return torch.relu(self.norm(self.head(x)))


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many convolutions each native call has run."""
    counts: list[int] = []
    run = ConvProgram.__call__

    def counted(self: ConvProgram, *inputs: Tensor) -> list[Tensor]:
        counts.append(len(self._calls))
        return run(self, *inputs)

    monkeypatch.setattr(ConvProgram, "__call__", counted)
    return counts


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def require_like_eager(model: nn.Module, fused: nn.Module, x: Tensor) -> None:
    want, got = model(x), fused(x)
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]] = {
    "inverted residual": (Inverted, (2, 24, 9, 10), [3]),
    "without a sum": (lambda: Inverted(24, 40), (2, 24, 9, 10), [3]),
    "two results": (Branches, (2, 16, 8, 8), [2]),
    # those of two whose shortcut is padded read what no step has made; the others are joined
    "basic blocks": (lambda: create("cifar_resnet20", seed=0), (2, 3, 32, 32), [4, 4, 6]),
    # the stem with its max-pool, and each stage
    "bottlenecks": (lambda: create("resnet50", seed=0), (1, 3, 64, 64), [2, 10, 10, 13, 19]),
    "a stem in strips": (lambda: create("resnet18", seed=0), (1, 3, 200, 210), [2, 4, 5, 5, 5]),
    "sequences in a sequence": (
        lambda: nn.Sequential(*(nn.Sequential(Inverted(), Inverted()) for _ in range(2))),
        (2, 24, 9, 10), [12],
    ),
    "layers around blocks": (Backbone, (2, 24, 9, 10), [11]),
    "blocks within blocks": (
        lambda: nn.Sequential(Backbone(), nn.Conv2d(48, 24, 1), Backbone(2)), (2, 24, 9, 10), [20],
    ),
    "a layer in between": (
        lambda: nn.Sequential(*(Inverted() for _ in range(2)), nn.AvgPool2d(2), Inverted()),
        (2, 24, 9, 10), [3, 6],
    ),
    # eight channels are too few for the native kernels
    "a block that is not native": (
        lambda: nn.Sequential(*map(Inverted, [24, 24, 24, 8, 24, 24], [24, 24, 8, 24, 24, 24])),
        (2, 24, 9, 10), [6, 9],
    ),
}  # fmt: skip


# Of images that are contiguous, where a padded shortcut is, too, and its sum asks for the format.
CONTIGUOUS = {"basic blocks": [2, 2, 2, 2, 6]}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_one_native_call(name: str, channels_last: bool, programs: list[int]) -> None:
    make, shape, calls = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    x = images(*shape)
    if channels_last:
        model, x = (
            model.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )
    fused = fuse(copy.deepcopy(model))
    require_like_eager(model, fused, x)
    programs.clear()
    require_like_eager(model, fused, x)
    assert sorted(programs) == (calls if channels_last else CONTIGUOUS.get(name, calls))
    require_like_eager(
        model,
        fused,
        images(*shape, seed=1).contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        ),
    )


@torch.inference_mode()
def test_weights_that_change_are_followed(programs: list[int]) -> None:
    model = Inverted().eval()
    fused = fuse(copy.deepcopy(model))
    x = images(1, 24, 7, 7)
    for _ in range(3):
        require_like_eager(model, fused, x)
    for module in (model, fused):
        module.depthwise.weight.mul_(-1.5)
        module.bn3.running_mean.add_(1)
    for _ in range(3):
        require_like_eager(model, fused, x)
    assert len(programs) > 2


def test_a_convolution_that_is_not_native_runs_in_its_turn(programs: list[int]) -> None:
    """Eight channels are too few for the native kernels."""
    model = Inverted(24, 8).eval()
    fused = fuse(copy.deepcopy(model))
    for seed in range(3):
        require_like_eager(model, fused, images(1, 24, 7, 7, seed=seed))
    assert not programs


@torch.inference_mode()
def test_an_input_that_the_caller_keeps_is_not_written_to() -> None:
    model = create("cifar_resnet20", seed=0).eval()
    block = fuse(model).layer1[0]
    x = images(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    for _ in range(3):
        block(x)
    assert torch.equal(x, before)


def three_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Inverted(), Inverted(), Inverted()).eval()


def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone().eval()


def gated_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = nn.Sequential(Gated(), Gated(), Gated()).eval()
    return blocks.to(memory_format=torch.channels_last)


@torch.inference_mode()
def test_convolutions_around_a_gate_are_joined_with_the_same_bits(programs: list[int]) -> None:
    model = gated_blocks()
    fused = fuse(copy.deepcopy(model))
    x = images(2, 24, 9, 10).contiguous(memory_format=torch.channels_last)
    fused(x)  # the gates' own layers say once which strides their results have
    answers = [fused(x) for _ in range(3)]
    programs.clear()
    answers.append(fused(x))
    assert programs == [2, 1] * 3
    assert all(torch.equal(y, answers[0]) for y in answers)
    require_like_eager(model, fused, x)
    require_like_eager(model, fused, x.contiguous())


@torch.inference_mode()
def test_no_value_is_kept_behind_its_last_reader() -> None:
    """What the depthwise convolution has made is freed once the gate has read it."""
    model = gated_blocks()
    fused = fuse(model)
    x = images(2, 24, 9, 10).contiguous(memory_format=torch.channels_last)
    for _ in range(4):
        fused(x)
    seen: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    run = ConvProgram.__call__

    def watched(self: ConvProgram, *inputs: Tensor) -> list[Tensor]:
        made = run(self, *inputs)
        alive.extend(ref() is not None for ref in seen)
        seen[:] = [weakref.ref(made[0])] if len(self._calls) == 2 else []
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConvProgram, "__call__", watched)
        fused(x)
    assert alive == [False] * 3


@pytest.mark.parametrize(("make", "count"), [(three_blocks, 9), (backbone, 11), (gated_blocks, 2)])
@pytest.mark.parametrize("change", [
    lambda model: model[1].depthwise.weight.data.mul_(-1.5),
    lambda model: model[1].bn3.running_mean.add_(1),
    lambda model: model.__setitem__(1, nn.MaxPool2d(3, 1, 1)),
    lambda model: model[1].register_forward_hook(lambda *given: given[-1] + 1),
    lambda model: model[1].depthwise.register_forward_pre_hook(lambda _, given: (given[0] + 1,)),
    lambda model: setattr(model[2], "forward", lambda x: x + 1),
    lambda model: setattr(model[1], "adds", False),
    lambda model: model.append(nn.ReLU()),
    lambda model: model.double().float(),
    lambda model: model.to(memory_format=torch.channels_last),
    lambda model: model[1].train(),
    lambda model: model.load_state_dict(copy.deepcopy(model).apply(randomize).state_dict()),
])  # fmt: skip
@torch.inference_mode()
def test_joined_blocks_follow_every_change(
    make: Callable[[], nn.Module],
    count: int,
    change: Callable[[nn.Module], object],
    programs: list[int],
) -> None:
    model = make()
    fused = fuse(copy.deepcopy(model))
    x = images(2, 24, 7, 7)
    for _ in range(5):
        require_like_eager(model, fused, x)
    assert programs[-1] == count
    for module in (model, fused):
        change(module)
    for _ in range(5):
        require_like_eager(model, fused, x)
        require_like_eager(model, fused, images(1, 24, 8, 8))


def randomize(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters(recurse=False):
        parameter.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize("make", [three_blocks, backbone, gated_blocks])
@torch.inference_mode()
def test_joined_blocks_of_several_threads_and_shapes(make: Callable[[], nn.Module]) -> None:
    """With more shapes than there are joined blocks kept for."""
    model = make()
    fused = fuse(copy.deepcopy(model))
    given = [images(n, 24, 6 + size, 7, seed=size) for size in range(6) for n in (1, 2, 3)]
    wanted = [model(x) for x in given]

    def run(first: int) -> bool:
        with torch.inference_mode():
            order = [(first + 5 * i) % len(given) for i in range(3 * len(given))]
            return all(torch.allclose(fused(given[i]), wanted[i], 1e-4, 1e-4) for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


@torch.inference_mode()
def test_joined_blocks_use_the_memory_of_a_few_results() -> None:
    model = nn.Sequential(*(Inverted() for _ in range(6))).eval()
    fused = fuse(model)
    x = images(1, 24, 10, 10)
    for _ in range(3):
        fused(x)
    (bound,) = {
        id(each): each
        for forwards in fused._resfuse_plan.forwards.values()
        for joined in forwards._joined.values()
        for blocks in joined.values()
        for each in blocks.region._made[1]._here.bound.values()
    }.values()
    wide, narrow = 96 * 100, 24 * 100
    assert sum(bound.buffers) <= 2 * wide + 2 * narrow


@torch.inference_mode()
def test_a_stem_keeps_nan_and_infinities(programs: list[int]) -> None:
    model = create("resnet18", seed=0).eval()
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool).eval()
    stem.to(memory_format=torch.channels_last)
    x = images(2, 3, 160, 170).contiguous(memory_format=torch.channels_last)
    x[0, 0, 3, 5], x[1, 1, 77, 100], x[1, 2, 150, 9] = float("nan"), float("inf"), -float("inf")
    fused = fuse(copy.deepcopy(stem))
    for _ in range(2):
        torch.testing.assert_close(fused(x), stem(x), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert programs == [2]


def test_threads_that_start_together_read_one_layout_of_a_weight() -> None:
    """A step holds the weight's address: a second copy would free the first."""
    conv = NativeConv(images(32, 32, 3, 3), images(32), Geometry(padding=(1, 1)), "identity", None)
    together = threading.Barrier(8)

    def address(_: int) -> int:
        together.wait()
        return conv.step((1, 32, 16, 16), False)[0].w

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(address, range(8)))) == 1
