"""The engine on whole networks: what it computes, what it promises, and what it refuses."""

import copy
import json
import os
import subprocess
import sys
import threading
import warnings
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision.models as tv
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from graphs import error
from resfuse.kernels import fuse
from resfuse.kernels.engine import engine as engine_module
from resfuse.kernels.engine.capture import capture
from resfuse.kernels.engine.choice import Choice
from resfuse.kernels.engine.engine import Engine, build_engine
from resfuse.kernels.engine.executor import Executor
from resfuse.kernels.engine.graph import Conv, Graph, Torch
from resfuse.kernels.engine.measure import Measurer
from resfuse.kernels.engine.saved import load_engine
from resfuse.kernels.engine.tactics import native, onednn
from resfuse.kernels.native.convolution import choose
from resfuse.kernels.tolerance import EAGER_FACTOR, TOLERANCES
from resfuse.resnet_ref import create

pytestmark = pytest.mark.usefixtures("own_cache")

AS_FUSED = 1e-6  # issue 4: equal to `fused`, relative


class Scope(nn.Module):
    """A module around one function of its layers, for forwards of every shape."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def made(factory: Callable[[], nn.Module]) -> nn.Module:
    """A network whose batch norms are not the identity, in eval mode."""
    torch.manual_seed(0)
    model = factory().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | FrozenBatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.8, 1.25)  # type: ignore[arg-type]
    return model


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def leaves(model: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    return [leaf.clone() for leaf in tree_leaves(model(x))]


# The zoo

RESNET50 = {"Conv": 54, "MaxPool": 1, "Mean": 1}  # 53 convolutions and the linear layer
ZOO: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "resnet18": (lambda: create("resnet18"), {"Conv": 21, "MaxPool": 1, "Mean": 1}),
    "resnet50": (lambda: create("resnet50"), RESNET50),
    "resnext50_32x4d": (lambda: create("resnext50_32x4d"), RESNET50),
    "wide_resnet50_2": (lambda: create("wide_resnet50_2"), RESNET50),
    # of the shortcuts, two halve and pad: slices in both directions, and a pad each
    "cifar_resnet20": (
        lambda: create("cifar_resnet20"),
        {"Conv": 20, "Mean": 1, "aten.slice.Tensor": 4, "aten.pad.default": 2},
    ),
    "vgg19_bn": (
        lambda: tv.vgg19_bn(weights=None),
        {"Conv": 19, "MaxPool": 5, "aten.adaptive_avg_pool2d.default": 1},  # windows of two sizes
    ),
    # its last norm and activation, and those in front of each 1x1, follow a concatenation
    "densenet121": (
        lambda: tv.densenet121(weights=None),
        {
            "Conv": 121, "MaxPool": 1, "Mean": 1, "Concat": 62, "Affine": 62,
            "AveragePool": 3,
        },
    ),
    "mobilenet_v2": (lambda: tv.mobilenet_v2(weights=None), {"Conv": 53, "Mean": 1}),
    "googlenet": (
        lambda: tv.googlenet(weights=None, init_weights=False),
        {"Conv": 58, "Mean": 1, "Concat": 9, "MaxPool": 13},
    ),
    "timm resnet50d": (
        lambda: timm.create_model("resnet50d"),
        {"Conv": 56, "MaxPool": 1, "Mean": 1, "AveragePool": 3},
    ),
    # 16 gates: a mean, two 1x1, a sigmoid, a product that takes in the sum; a projection adds first
    "timm seresnet50": (
        lambda: timm.create_model("seresnet50"),
        {
            "Conv": 86, "MaxPool": 1, "Mean": 17, "Affine": 16, "aten.sigmoid.default": 16,
        },
    ),
    "timm resnet18, five outputs": (
        lambda: timm.create_model("resnet18", features_only=True),
        {"Conv": 20, "MaxPool": 1},
    ),
    "Unet ResNet-18": (
        lambda: smp.Unet("resnet18", encoder_weights=None),
        {"Conv": 31, "MaxPool": 1, "Concat": 4, "Pick": 5},
    ),
    "a detector's backbone": (
        lambda: resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d
        ),
        {"Conv": 61, "MaxPool": 2, "Pick": 3},
    ),
    "timm ecaresnet26t": (
        lambda: timm.create_model("ecaresnet26t"),
        {
            "Conv": 32, "MaxPool": 1, "Mean": 9, "AveragePool": 3, "Affine": 8,
            "aten.view.default": 16, "aten.conv1d.default": 8, "aten.sigmoid.default": 8,
        },
    ),
    "FCN-R50, a dict": (
        lambda: tv.segmentation.fcn_resnet50(weights=None, weights_backbone=None),
        {"Conv": 55, "MaxPool": 1, "aten.upsample_bilinear2d.vec": 1},
    ),
}  # fmt: skip
# Here roundings grow from layer to layer: eager itself is up to 6e-6 from fp64, and so is `fused`.
AMPLIFYING = (
    "resnet50", "wide_resnet50_2", "vgg19_bn", "Unet ResNet-18", "FCN-R50, a dict",
    "a detector's backbone",
)  # fmt: skip


def chosen_unmeasured(graph: Graph) -> list[Choice]:
    """Native steps wherever there are any, of convolutions the ones expected to be fastest."""
    choices = []
    for at, node in enumerate(graph.nodes):
        offered = [*native.segments(graph, at), *onednn.segments(graph, at)]
        if offered and offered[0].tactic == "native" and isinstance(node.op, Conv):
            config = asdict(choose(node.op.problem))
            choices.append(Choice("native", at, at + 1, tuple(config.items())))
        else:
            choices.append(offered[0] if offered else Choice("eager", at, at + 1))
    return choices


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("batch", [1, 3])
def test_networks_are_captured_whole_and_answer_as_fused(name: str, batch: int) -> None:
    factory, counts = ZOO[name]
    model = made(factory)
    # odd in both directions, where the network takes it
    sizes = (64, 96) if batch == 1 or name == "Unet ResNet-18" else (75, 61)
    x = images(batch, 3, *sizes)
    graph, state = capture(model, x)
    kinds = (n.op.target if isinstance(n.op, Torch) else type(n.op).__name__ for n in graph.nodes)
    assert Counter(kinds) == counts
    executor = Executor(graph, chosen_unmeasured(graph), state)
    got = [y.clone() for y in executor(x)]
    fused = leaves(fuse(model), x)
    nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)
    eager = leaves(model, x), leaves(nhwc, x.contiguous(memory_format=torch.channels_last))
    exact = leaves(model.double(), x.double())
    for y, own, plain, in_nhwc, want in zip(got, fused, *eager, exact, strict=True):
        assert y.shape == own.shape and y.dtype == own.dtype
        if name not in AMPLIFYING:
            assert error(y, own) <= AS_FUSED
        allowed = EAGER_FACTOR * max(error(plain, want), error(in_nhwc, want))
        assert error(y, want) <= allowed + TOLERANCES["ieee"].rtol


# Forwards of every shape

Pair = namedtuple("Pair", "a b")


def conv(c: int = 3, k: int = 16) -> nn.Conv2d:
    return nn.Conv2d(c, k, 3, padding=1)


FORWARDS: dict[str, Callable[[], nn.Module]] = {
    "pools that round up": lambda: nn.Sequential(
        conv(), nn.MaxPool2d(2, 2, ceil_mode=True), nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    ),
    "average pools": lambda: nn.Sequential(
        conv(), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
        nn.AdaptiveAvgPool2d((3, 1)), nn.AvgPool2d((2, 1), 1, divisor_override=3),
    ),
    "adaptive pools of uneven windows": lambda: nn.Sequential(conv(), nn.AdaptiveAvgPool2d(4)),
    "frozen norms with another eps": lambda: nn.Sequential(
        conv(), FrozenBatchNorm2d(16, eps=0.1), nn.ReLU(), conv(16), FrozenBatchNorm2d(16, eps=0.0)
    ),
    "a frozen norm alone": lambda: FrozenBatchNorm2d(3),
    "a gate and a sum": lambda: Scope(
        lambda s, x: (s.c(x) * s.c(x).mean((2, 3), keepdim=True).sigmoid() + s.d(x)).relu(),
        c=conv(), d=conv(),
    ),
    "a gate of one image for all": lambda: Scope(
        lambda s, x: s.c(x) * s.c(x).mean((0, 2, 3), keepdim=True), c=conv()
    ),
    "a map times itself": lambda: Scope(lambda s, x: (lambda y: y * y)(s.c(x)), c=conv()),
    "gates of gates": lambda: Scope(
        lambda s, x: (lambda g: g * g.sigmoid())(s.c(x).mean((2, 3), keepdim=True)), c=conv()
    ),
    "nearest upsampling": lambda: nn.Sequential(
        conv(), nn.Upsample(scale_factor=2), conv(16), nn.Upsample(size=(25, 11)),
        nn.Upsample(scale_factor=(0.7, 1.3)),
    ),
    "a constant": lambda: Scope(lambda s, x: s.c(x) + torch.arange(x.shape[3]).float(), c=conv()),
    "a check of the dtype": lambda: Scope(lambda s, x: s.c(x.to(torch.float32)), c=conv()),
    "bfloat16 inside": lambda: Scope(
        lambda s, x: torch.max_pool2d(s.c(x).to(torch.bfloat16), 2), c=conv()
    ),
    "halves, swapped": lambda: Scope(
        lambda s, x: torch.cat(s.c(x).chunk(2, 1)[::-1], 1), c=conv()
    ),
    "the second half only": lambda: Scope(lambda s, x: s.c(x).chunk(2, 1)[1].relu(), c=conv()),
    "one weight under two norms": lambda: Scope(
        lambda s, x: (s.a(s.c(x)), s.b(s.c(x))),
        c=conv(), a=nn.BatchNorm2d(16), b=nn.BatchNorm2d(16),
    ),
    "a norm plus a convolution": lambda: Scope(
        lambda s, x: s.c(x) + s.b(s.p(x)),
        c=conv(3, 3), b=nn.BatchNorm2d(3), p=nn.MaxPool2d(3, 1, 1),
    ),
    "a view of the input, added": lambda: Scope(
        lambda s, x: s.c(x) + x.view_as(x), c=conv(3, 3)
    ),
    "a map twice": lambda: Scope(lambda s, x: (lambda y: y + y)(s.c(x)), c=conv()),
    "one output twice": lambda: Scope(lambda s, x: [s.c(x)] * 2, c=conv()),
    "the input among the outputs": lambda: Scope(lambda s, x: (x, s.c(x)), c=conv()),
    "a nested dict": lambda: Scope(
        lambda s, x: OrderedDict(out=s.c(x), more={"aux": [s.c(x).relu()]}), c=conv()
    ),
    "a number": lambda: Scope(lambda s, x: s.c(x).mean(), c=conv()),
    "nothing": nn.Identity,
    "a pool only": lambda: nn.MaxPool2d(2),
    "layers without maps": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 9 * 8, 20), nn.BatchNorm1d(20), nn.PReLU(20), nn.Linear(20, 5)
    ),
    "in place": lambda: nn.Sequential(conv(), nn.ReLU(inplace=True), nn.Dropout(inplace=True)),
    "a transposed convolution": lambda: nn.Sequential(conv(), nn.ConvTranspose2d(16, 8, 2, 2)),
    "padding that is no zeros": lambda: nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect"),
}  # fmt: skip


def test_a_frozen_norm_is_folded_with_its_own_eps() -> None:
    """By torchvision's forward, and as detectron2 writes the same."""

    def by_detectron2(s: Any, x: Tensor) -> Tensor:
        x, n = s.c(x), s.n
        scale = n.weight * (n.running_var + 1e-3).rsqrt()
        bias = n.bias - n.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)

    forwards = (lambda s, x: s.n(s.c(x)), by_detectron2)
    for forward, eps in zip(forwards, (0.1, 1e-3), strict=True):
        graph, _ = capture(
            made(lambda f=forward: Scope(f, c=conv(), n=FrozenBatchNorm2d(16, eps=0.1))),
            images(2, 3, 9, 8),
        )
        (node,) = graph.nodes
        assert isinstance(node.op, Conv) and node.op.norm is not None
        assert node.op.norm.eps == eps
        assert (node.op.norm.mean, node.op.norm.var) == ("n.running_mean", "n.running_var")
        assert (node.op.norm.weight, node.op.norm.bias) == ("n.weight", "n.bias")


def test_what_only_looks_like_a_norm_is_computed_as_it_is(timings: Path) -> None:
    """The mean is scaled by something else."""

    def forward(s: Any, x: Tensor) -> Tensor:
        scale = (s.n.weight * (s.n.running_var + 1e-3).rsqrt()).view(1, -1, 1, 1)
        other = s.n.weight.view(1, -1, 1, 1)
        shift = s.n.bias.view(1, -1, 1, 1) - s.n.running_mean.view(1, -1, 1, 1) * other
        return s.c(x) * scale + shift

    model = made(lambda: Scope(forward, c=conv(), n=FrozenBatchNorm2d(16)))
    graph, _ = capture(model, images(2, 3, 9, 8))
    assert not any(isinstance(n.op, Conv) and n.op.norm for n in graph.nodes)
    require_answers(build_engine(model, images(2, 3, 9, 8), timings=timings), model,
                    images(2, 3, 9, 8))  # fmt: skip


@pytest.fixture(scope="module")
def timings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("timings")


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_of_every_shape(name: str, timings: Path) -> None:
    model, x = made(FORWARDS[name]), images(2, 3, 9, 8)
    before = x.clone()
    engine = build_engine(model, x, timings=timings)
    with torch.no_grad():
        want = model(x.clone())
    got = engine(x)
    assert torch.equal(x, before)
    assert type(got) is type(want)
    for y, plain in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert y.shape == plain.shape and y.dtype == plain.dtype
        assert error(y, plain) < AS_FUSED
    assert "samples/s" in engine.explain() or name == "nothing"


# An engine for the rest


def small() -> nn.Module:
    """Convolutions of every form, a projection, a concatenation, and one opaque segment."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.pool(s.stem(x).relu())
        y = (s.norm(s.conv(x)) + s.projection(x)).relu()
        z = torch.sigmoid(s.grouped(y))
        return s.head(torch.cat([y, z], 1).mean((2, 3)))

    return Scope(
        forward, stem=nn.Conv2d(3, 16, 7, 2, 3), pool=nn.MaxPool2d(3, 2, 1),
        conv=conv(16, 32), norm=nn.BatchNorm2d(32), projection=nn.Conv2d(16, 32, 1),
        grouped=nn.Conv2d(32, 32, 3, padding=1, groups=8), head=nn.Linear(64, 10),
    )  # fmt: skip


def maps() -> nn.Module:
    """Returns a map and a row."""
    return Scope(lambda s, x: {"map": s.c(x), "row": s.c(x).mean((2, 3))}, c=conv())


SHAPE = (2, 3, 33, 29)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made(small)


@pytest.fixture
def engine(model: nn.Module, timings: Path) -> Engine:
    return build_engine(model, images(*SHAPE), timings=timings)


def require_answers(engine: Engine, model: nn.Module, x: Tensor) -> None:
    for y, want in zip(leaves(engine, x), leaves(model, x), strict=True):
        assert y.shape == want.shape
        assert error(y, want) < AS_FUSED


def test_a_resnet_by_measured_times(timings: Path) -> None:
    resnet = made(lambda: create("cifar_resnet20"))
    engine = build_engine(resnet, images(2, 3, 32, 32), timings=timings)
    require_answers(engine, resnet, images(2, 3, 32, 32, seed=2))
    require_answers(engine, resnet, images(2, 3, 32, 32, seed=3))


def test_bfloat16_goes_through_torch_and_is_right(timings: Path) -> None:
    model = made(small).to(torch.bfloat16)
    x = images(*SHAPE).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is barred
        engine = build_engine(model, x, timings=timings)
    said = engine.explain()
    assert "native" not in said
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
    assert stem <= memory.least <= memory.arena
    room = engine._built[2].executor.room  # its floats end with a line that may be read, not used
    assert memory.arena <= 4 * room._floats.numel() <= memory.arena + 64
    weights = 3 * 16 * 49 + 16 * 32 * 9 + 16 * 32 + 32 * 4 * 9 + 64 * 10
    assert memory.weights == 0 or memory.weights > 4 * weights / 2
    with pytest.raises(ValueError, match="argument batch_size: 7"):
        engine.memory(7)


def test_explain_has_a_line_for_every_segment(engine: Engine) -> None:
    lines = engine.explain().splitlines()
    graph = engine._built[2].graph
    lines_of_nodes = lines[2 : 2 + len(graph.nodes)]
    rows = [line for line in lines_of_nodes if not line.startswith("+ ")]
    assert lines[0].startswith("segment") and set(lines[1]) == {"-", " "}
    for row, what in zip(
        lines_of_nodes, ["stem 2x3x33x29 k16 7x7 /2 relu", "max-pool"], strict=False
    ):
        assert row.removeprefix("+ ").startswith(what)
    assert lines[2 + len(graph.nodes)] == "" and len(rows) == len(engine._built[2].segments)
    assert "aten.sigmoid.default" in lines[-1] and "1 segment" in lines[-1]
    assert f"{len(rows)} segments" in engine.explain()
    with pytest.raises(ValueError, match="argument batch_size: 7"):
        engine.explain(7)


def test_a_second_build_measures_nothing(timings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(small), images(*SHAPE)
    first = build_engine(model, x, timings=timings)
    (file,) = timings.iterdir()
    before = file.read_bytes()
    measurers: list[Measurer] = []

    class Noted(Measurer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            measurers.append(self)

    monkeypatch.setattr(engine_module, "Measurer", Noted)
    second = build_engine(model, x, timings=timings)
    assert [m.measured for m in measurers] == [0]
    assert file.read_bytes() == before
    assert second._built[2].segments == first._built[2].segments


# Save and load


@pytest.fixture
def saved(engine: Engine, tmp_path: Path) -> Path:
    path = tmp_path / "small.engine"
    engine.save(path)
    return path


def test_a_loaded_engine_gives_the_same_bits(engine: Engine, saved: Path) -> None:
    loaded = load_engine(saved)
    for seed in (1, 2):
        x = images(*SHAPE, seed=seed)
        assert torch.equal(loaded(x), engine(x))
    assert loaded.batch_sizes == engine.batch_sizes
    assert loaded._built[2].segments == engine._built[2].segments
    with pytest.raises(ValueError, match="a batch of 3"):
        loaded(images(3, *SHAPE[1:]))


def test_a_loaded_engine_can_be_saved_and_refreshed(saved: Path, tmp_path: Path) -> None:
    loaded, other = load_engine(saved), made(small)
    with torch.no_grad():
        other.get_parameter("stem.weight").mul_(1.5)
    loaded.refresh(other.state_dict())
    require_answers(loaded, other, images(*SHAPE))
    loaded.save(tmp_path / "again.engine")
    x = images(*SHAPE)
    assert torch.equal(load_engine(tmp_path / "again.engine")(x), loaded(x))


def test_nothing_is_unpickled(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        told = json.loads(file.metadata()["resfuse"])
    assert told["schema"] == 1 and list(told["plans"]) == ["2"]


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another plan with the same weights."""
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["resfuse"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(told)
    save_file(tensors, path, metadata={"resfuse": json.dumps(told)})


def drop_a_weight(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["stem.weight"]
    save_file(tensors, path, metadata=metadata)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "no engine, or a damaged one"),
    "cut in the header": (lambda p: cut(p, 0.01), "no engine, or a damaged one"),
    "cut in the weights": (lambda p: cut(p, 0.9), "no engine, or a damaged one"),
    "something else": (lambda p: p.write_bytes(b"\x80\x04K\x01." * 99), "no engine"),
    "weights only": (lambda p: save_file({"w": torch.ones(1)}, p), "no engine"),
    "another schema": (lambda p: rewrite(p, lambda t: t.update(schema=99)), "has schema 99"),
    "no schema": (lambda p: rewrite(p, lambda t: t.pop("schema")), "has schema None"),
    "another torch": (
        lambda p: rewrite(p, lambda t: t["environment"].update(torch="1.0")), "with torch 1.0",
    ),
    "another processor": (
        lambda p: rewrite(p, lambda t: t["environment"].update(device="a 6502")), "device a 6502",
    ),
    "a weight is missing": (drop_a_weight, "no plan that can be run"),
    "no plans": (lambda p: rewrite(p, lambda t: t.pop("plans")), "no plan that can be run"),
    "empty plans": (lambda p: rewrite(p, lambda t: t["plans"].clear()), "no plan that can be run"),
    "no environment": (
        lambda p: rewrite(p, lambda t: t.pop("environment")), "no plan that can be run",
    ),
    "an unknown tactic": (
        lambda p: rewrite(
            p, lambda t: t["plans"]["2"]["segments"][0]["choice"].update(tactic="magic")
        ),
        "no plan that can be run",
    ),
    "not an object": (
        lambda p: save_file({"w": torch.ones(1)}, p, metadata={"resfuse": "[1, 2]"}), "no engine",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_load_refuses_in_a_sentence(saved: Path, what: str) -> None:
    damage, said = DAMAGE[what]
    damage(saved)
    with pytest.raises(ValueError, match=f"argument path: .*{said}"):
        load_engine(saved)


def test_load_refuses_an_engine_of_a_gpu_where_there_is_none(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(saved, lambda told: told.update(device_type="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="was built on a GPU; there is none here"):
        load_engine(saved)


def test_load_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"argument path: .*missing\.engine does not exist"):
        load_engine(tmp_path / "missing.engine")


FULL_DISK = """
import resource, sys
from resfuse.kernels.engine.saved import load_engine
engine = load_engine(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    engine.save(sys.argv[1])
except OSError as error:
    print("refused:", error)
"""


def test_a_full_disk_leaves_the_old_engine(saved: Path) -> None:
    """No file may grow past 4 KB there, which a write meets as it meets a full disk."""
    before = saved.read_bytes()
    assert len(before) > 4096
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(saved)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout and "cannot be written" in done.stdout
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_that_is_not_there_is_an_os_error(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        engine.save(tmp_path / "missing" / "small.engine")


# Refresh


def test_refresh_brings_new_answers(engine: Engine, model: nn.Module) -> None:
    x = images(*SHAPE)
    before = engine(x)
    other = made(small)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.2)
    other.get_buffer("norm.running_mean").add_(0.5)
    engine.refresh(other.state_dict())
    require_answers(engine, other, x)
    engine.refresh(model.state_dict())
    assert torch.equal(engine(x), before)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda state: state.pop("conv.weight"), "conv.weight is missing"),
        (lambda state: state.update({"conv.weight": torch.ones(1)}), "conv.weight has shape"),
        (lambda state: state["conv.weight"].fill_(float("nan")), "conv.weight holds"),
        (lambda state: state["norm.running_var"].fill_(float("inf")), "norm.running_var holds"),
    ],
)
def test_refresh_refuses_and_changes_nothing(
    engine: Engine, model: nn.Module, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    x = images(*SHAPE)
    before = engine(x)
    state = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=f"argument state_dict: {said}"):
        engine.refresh(state)
    assert torch.equal(engine(x), before)


def test_an_engine_without_its_weights(timings: Path, model: nn.Module, tmp_path: Path) -> None:
    engine = build_engine(model, images(*SHAPE), timings=timings, keep_weights=False)
    require_answers(engine, model, images(*SHAPE))
    with pytest.raises(ValueError, match="keep_weights=False"):
        engine.save(tmp_path / "small.engine")
    with pytest.raises(ValueError, match="keep_weights=False"):
        engine.refresh(model.state_dict())
    assert not list(tmp_path.iterdir())


# What is refused


def with_nan() -> nn.Module:
    model = made(small)
    with torch.no_grad():
        model.get_parameter("conv.weight")[3, 2, 1, 0] = float("nan")
    return model


BAD_BUILDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "training": (lambda: made(small).train(), {}, "argument model: it is in training mode"),
    "a part in training": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(16).train()), {}, "argument model: .*training",
    ),
    "control flow": (
        lambda: made(lambda: Scope(lambda s, x: s.c(x) if x.sum() > 0 else x, c=conv())), {},
        "argument model: Scope cannot be exported: .*data-dependent",
    ),
    "a number of the data's": (
        lambda: made(lambda: Scope(lambda s, x: s.c(x) * x.sum().item(), c=conv())), {},
        "argument model: .*data-dependent",
    ),
    "a size of the data's": (
        lambda: made(lambda: Scope(lambda s, x: s.c(x)[s.c(x) > 0], c=conv())), {},
        "argument model: .*",
    ),
    "NaN": (with_nan, {}, "argument model: conv.weight holds values that are not finite"),
    "writes its input": (
        lambda: made(lambda: Scope(lambda s, x: s.c(x.mul_(2)), c=conv())), {},
        "argument model: Scope writes to x",
    ),
    "a named tuple": (
        lambda: made(lambda: Scope(lambda s, x: Pair(s.c(x), x), c=conv())), {},
        "argument model: it returns a .*; accepted: tensors",
    ),
    "None among the outputs": (
        lambda: made(lambda: Scope(lambda s, x: {"a": s.c(x), "b": None}, c=conv())), {},
        "argument model: it returns None",
    ),
    "batch 0": (lambda: made(small), {"batch_sizes": (0, 1)}, "argument batch_sizes: 0"),
    "batch -1": (lambda: made(small), {"batch_sizes": (2, -1)}, "argument batch_sizes: -1"),
    "other_batches": (lambda: made(small), {"other_batches": "no"}, "argument other_batches: 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_BUILDS)
def test_what_cannot_be_built(what: str, timings: Path) -> None:
    factory, options, said = BAD_BUILDS[what]
    with pytest.raises(ValueError, match=said):
        build_engine(factory(), images(*SHAPE), timings=timings, **options)


@pytest.mark.parametrize(
    "example",
    [torch.ones(3), torch.ones(0, 3, 33, 29), torch.ones(SHAPE).to_sparse(), "an image", None],
)
@pytest.mark.parametrize("batch_sizes", [None, (2,)])
def test_what_is_no_example(
    model: nn.Module, example: Any, batch_sizes: tuple[int, ...] | None, timings: Path
) -> None:
    with pytest.raises(ValueError, match=r"argument (example|batch_sizes): "):
        build_engine(model, example, batch_sizes=batch_sizes, timings=timings)


@pytest.mark.parametrize(
    "x, said",
    [
        (images(2, 3, 33, 30), r"shape \(2, 3, 33, 30\); this engine takes \[N, 3, 33, 29\]"),
        (images(2, 4, 33, 29), "shape"),
        (images(3, 33, 29), "shape"),
        (images(*SHAPE).double(), "torch.float64; this engine takes torch.float32"),
        (images(*SHAPE).to(torch.bfloat16), "torch.bfloat16"),
        (torch.ones(SHAPE, dtype=torch.uint8), "torch.uint8"),
        (torch.ones(SHAPE, device="meta"), "on meta; this engine is on cpu"),
        (images(0, 3, 33, 29), "a batch of 0"),
        (images(*SHAPE).to_sparse(), "torch.sparse_coo; accepted: torch.strided"),
        (images(*SHAPE).to_mkldnn(), "torch._mkldnn; accepted: torch.strided"),
        ([1.0], "list; accepted: a tensor"),
        (None, "NoneType; accepted: a tensor"),
    ],
)
def test_what_cannot_be_run(engine: Engine, x: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"argument x: .*{said}"):
        engine(x)


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


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_an_engine_of_several_threads(model: nn.Module, timings: Path, tmp_path: Path) -> None:
    engine = build_engine(model, images(*SHAPE), timings=timings)
    require_answers(engine, model, images(*SHAPE, seed=4))
    engine.save(tmp_path / "small.engine")
    torch.set_num_threads(1)
    with pytest.raises(ValueError, match=r"2 threads; here it is .* 1 threads"):
        load_engine(tmp_path / "small.engine")
