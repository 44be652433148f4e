"""`build_engine(model, example, precision="bf16")`: float32 in and out, bfloat16 between."""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from graphs import error
from resfuse.kernels import Engine, build_engine, compile_backend
from resfuse.kernels.cpu import library as native_library
from resfuse.kernels.cpu.library import NativeUnavailable
from resfuse.kernels.engine.ir.graph import Conv, Convert, Torch
from resfuse.kernels.engine.load import load_engine
from resfuse.kernels.engine.saving.engine_file import _digest
from resfuse.kernels.ops.tolerance import EAGER_FACTOR

pytestmark = [pytest.mark.usefixtures("kept_exports"), pytest.mark.slow]

BF16 = torch.bfloat16


class SqueezeExcite(nn.Module):
    """A block of MobileNetV3: hard-swish, depthwise, and a gate from the mean of each map."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 5, padding=2, groups=c, bias=False)
        self.norm = nn.BatchNorm2d(c)
        self.down, self.up = nn.Conv2d(c, 8, 1), nn.Conv2d(8, c, 1)
        self.last = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm(self.depthwise(x)))
        gate = F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.last(y * gate)


class Odd(nn.Module):
    """Odd numbers of channels, groups, dilation, slopes, and what only torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slope = nn.Conv2d(3, 37, 3, stride=2, padding=1), nn.PReLU(37)
        self.norm = nn.BatchNorm2d(37)
        self.grouped = nn.Conv2d(48, 96, 3, padding=2, dilation=2, groups=3)
        self.second = nn.Conv2d(37, 48, (1, 3), padding=(0, 1))
        self.last = nn.Conv2d(133, 10, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.slope(self.first(x))
        z = F.leaky_relu(self.grouped(self.second(F.relu(self.norm(y)))), 0.2)
        z = torch.cat([F.avg_pool2d(z, 3, 1, 1), F.max_pool2d(y, 3, 1, 1)], 1)
        maps = F.interpolate(self.last(z), scale_factor=2, mode="bilinear")
        return maps, F.softmax(maps.mean((2, 3)), 1)


def gated() -> nn.Module:
    first = nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.Hardswish()
    last = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)
    return nn.Sequential(*first, SqueezeExcite(24), SqueezeExcite(24), *last)


def mobilenet() -> nn.Module:
    settings = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2], [6, 64, 2, 1]]
    return torchvision.models.MobileNetV2(num_classes=10, inverted_residual_setting=settings)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: torchvision.models.resnet18(num_classes=10),
    "MobileNetV2's blocks": mobilenet,
    "squeeze and excitation": gated,
    "odd channels": Odd,
}


@functools.cache
def made(name: str) -> tuple[nn.Module, Tensor]:
    """With statistics of batch norms that fit the network, so that values stay of unit size."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    with torch.no_grad():
        for _ in range(4):
            model.train()(torch.randn(8, 3, 32, 32))
    return model.eval(), torch.randn(2, 3, 32, 32)


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    made.cache_clear()


def leaves(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


@torch.no_grad()
def require_as_right_as_eager(engine: Engine, model: nn.Module, x: Tensor) -> None:
    """At most EAGER_FACTOR times the error of the model in bfloat16."""
    exact = leaves(copy.deepcopy(model).double()(x.double()))
    eager = leaves(copy.deepcopy(model).to(BF16)(x.to(BF16)))
    got = leaves(engine(x))
    for y, own, want in zip(got, eager, exact, strict=True):
        assert y.dtype == x.dtype and y.shape == want.shape
        found, allowed = error(y, want), EAGER_FACTOR * error(own, want)
        assert 1e-5 < found < allowed, f"{found:.2e}, allowed {allowed:.2e}"


def convolutions(engine: Engine) -> dict[str, torch.dtype]:
    (graph,) = engine.graphs
    nodes = [node for node in graph.nodes if isinstance(node.op, Conv)]
    return {n.op.weight: graph.values[n.name].dtype for n in nodes if isinstance(n.op, Conv)}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_as_right_as_eager_in_bfloat16(name: str, timings: Path) -> None:
    model, x = made(name)
    engine = build_engine(model, x, precision="bf16", timings=timings)
    require_as_right_as_eager(engine, model, x)
    require_as_right_as_eager(engine, model, x.to(memory_format=torch.channels_last))
    assert engine.precision == "bf16" and "computed in bf16" in str(engine)
    assert set(convolutions(engine).values()) == {BF16}


def test_images_that_are_converted_are_not_padded(timings: Path) -> None:
    """Three channels in float32, and with a fourth in bfloat16; whole vectors take 8 or 16."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    engine = build_engine(nn.Conv2d(3, 16, 3, 4, 1).eval(), x, precision="bf16", timings=timings)
    assert engine.memory().least_arena_bytes < 1.2 * 2 * 64 * 64 * (4 * 3 + 2 * 4)


def test_torch_operations_that_add_up_see_float32(timings: Path) -> None:
    model, x = made("odd channels")
    (graph,) = build_engine(model, x, precision="bf16", timings=timings).graphs
    seen = {
        node.op.target.split(".")[1]: graph.values[node.inputs[0]].dtype
        for node in graph.nodes
        if isinstance(node.op, Torch)
    }
    assert seen["softmax"] == seen["upsample_bilinear2d"] == torch.float32
    assert all(graph.values[name].dtype == torch.float32 for name in (graph.input, *graph.outputs))


def test_half_of_the_memory_is_enough(timings: Path) -> None:
    """Beside image and output, which are float32, and scratch memory."""
    layers = [nn.Conv2d(3 if i == 0 else 64, 64, 1) for i in range(4)]
    model, x = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)).eval(), torch.randn(2, 3, 64, 64)
    of = [build_engine(model, x, precision=p, timings=timings) for p in ("bf16", "fp32")]
    narrow, wide = (engine.memory() for engine in of)
    assert narrow.arena_bytes < 0.6 * wide.arena_bytes
    assert narrow.weights_bytes < 0.6 * wide.weights_bytes
    assert narrow.originals_bytes == wide.originals_bytes


def test_explain_shows_the_precision_of_each_segment(timings: Path) -> None:
    model, x = made("ResNet-18")
    engine = build_engine(model, x, precision="bf16", keep=["layer4"], timings=timings)
    lines = engine.explain().partition("\n\n")[0].splitlines()
    column = lines[0].index("precision")
    rows = [line for line in lines[2:] if not line.startswith("+ ")]
    shown = {line.split()[0]: line[column:].split()[0] for line in rows}
    assert shown["layer1.0.conv1"] == "bf16" and shown["layer4.0.conv1"] == "fp32"


@pytest.mark.parametrize("pattern", ["layer4", "layer4.*", "layer4.?.*conv*.weight"])
def test_what_is_to_be_kept_is_computed_in_float32(pattern: str, timings: Path) -> None:
    model, x = made("ResNet-18")
    engine = build_engine(model, x, precision="bf16", keep=[pattern, "fc"], timings=timings)
    kept = {name for name, dtype in convolutions(engine).items() if dtype == torch.float32}
    convs = {f"layer4.{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2)}
    assert kept >= convs | {"fc.weight"} and "layer3.0.conv1.weight" not in kept
    require_as_right_as_eager(engine, model, x)


def test_all_kept_is_float32(timings: Path) -> None:
    model, x = made("ResNet-18")
    engine = build_engine(model, x, precision="bf16", keep=["*"], timings=timings)
    assert not any(isinstance(node.op, Convert) for node in engine.graphs[0].nodes)
    with torch.no_grad():
        assert error(engine(x), model(x)) < 1e-5


def test_a_model_in_bfloat16_runs_the_same_kernels(timings: Path) -> None:
    model, x = made("ResNet-18")
    narrow, given = copy.deepcopy(model).to(BF16), x.to(BF16)
    engine = build_engine(narrow, given, timings=timings)
    require = build_engine(narrow, given, precision="bf16", timings=timings)
    assert torch.equal(engine(given), require(given)) and engine(given).dtype == BF16
    assert "native" in engine.explain()
    with torch.no_grad():
        want, own = copy.deepcopy(narrow).double()(given.double()), narrow(given)
    assert error(engine(given), want) < EAGER_FACTOR * error(own, want)


def test_without_native_steps_torch_computes_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise NativeUnavailable("no compiler")

    model, x = made("squeeze and excitation")
    monkeypatch.setattr(native_library, "library", none)
    engine = build_engine(model, x, precision="bf16", timings=tmp_path)
    assert "native" not in engine.explain()
    require_as_right_as_eager(engine, model, x)


# What else an engine does


def test_saved_cloned_and_refreshed_it_stays_in_bfloat16(timings: Path, tmp_path: Path) -> None:
    model, x = made("squeeze and excitation")
    other = copy.deepcopy(model)
    engine = build_engine(model, x, precision="bf16", keep=["0"], timings=timings)
    engine.save(tmp_path / "engine")
    loaded = load_engine(tmp_path / "engine")
    assert loaded.precision == "bf16" and convolutions(loaded) == convolutions(engine)
    assert torch.equal(loaded(x), engine(x)) and torch.equal(engine.clone()(x), engine(x))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    for one in (engine, loaded):
        one.refresh(other.state_dict())
        require_as_right_as_eager(one, other, x)


@pytest.mark.parametrize("how", ["pad", "eager"])
def test_other_batches(how: str, timings: Path) -> None:
    model, x = made("squeeze and excitation")
    engine = build_engine(
        model, x, batch_sizes=[2, 4], other_batches=how, precision="bf16", timings=timings,  # type: ignore[arg-type]
    )  # fmt: skip
    three = torch.cat([x, x[:1]])
    with torch.no_grad():
        want = model(three)
    assert engine(three).shape == (3, 10) and error(engine(three), want) < 0.05
    if how == "pad":
        full = torch.cat([three, torch.zeros_like(x[:1])])
        assert torch.equal(engine(three), engine(full)[:3])


def test_other_shapes_are_built_in_bfloat16(timings: Path) -> None:
    model, x = made("squeeze and excitation")
    engine = build_engine(
        model, x, shapes=[(1, 3, 32, 32)], other_shapes="build", precision="bf16", timings=timings
    )
    larger = torch.randn(2, 3, 40, 32)
    require_as_right_as_eager(engine, model, larger)
    assert all(graph.dtype == BF16 for graph in engine.graphs) and len(engine.shapes) == 2


def test_torch_compile_takes_it_as_an_option(timings: Path) -> None:
    model, x = made("squeeze and excitation")
    options = {"precision": "bf16", "timings": timings}
    compiled = torch.compile(model, backend=compile_backend, options=options)
    with torch.no_grad():
        got = compiled(x)
    assert torch.equal(got, build_engine(model, x, **options)(x))  # type: ignore[arg-type]


# What is refused


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval()


X = torch.zeros(1, 3, 8, 8)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "an unknown precision": (
        lambda: build_engine(small(), X, precision="int4"),
        "argument precision: 'int4'; accepted: fp32, bf16, int8",
    ),
    "fp32 of a narrower model": (
        lambda: build_engine(small().to(BF16), X.to(BF16), precision="fp32"),
        "argument precision: 'fp32' of a model that takes torch.bfloat16",
    ),
    "fp16": (
        lambda: build_engine(small().half(), X.half(), precision="bf16"),
        "a model that takes torch.float16; accepted: with models that take torch.float32",
    ),
    "fp64": (
        lambda: build_engine(small().double(), X.double(), precision="bf16"),
        "a model that takes torch.float64",
    ),
    "weights in fp64": (
        lambda: build_engine(small().double(), X, precision="bf16"),
        "argument model: 0.weight is torch.float64; precision='bf16' accepts weights in float32",
    ),
    "a pattern that matches nothing": (
        lambda: build_engine(small(), X, precision="bf16", keep=["0", "head.*"]),
        "argument keep: 'head.*' matches no convolution or linear layer; accepted: names of "
        "modules or parameters such as 0",
    ),
    "patterns without bf16": (
        lambda: build_engine(small(), X, keep=["0"]),
        "argument keep: given without precision='bf16'",
    ),
    "one pattern, in no list": (
        lambda: build_engine(small(), X, precision="bf16", keep="0"),
        "argument keep: '0'; accepted: a list of patterns",
    ),
    "float32 of a model in bfloat16": (
        lambda: build_engine(small().to(BF16), X.to(BF16), precision="bf16", keep=["0"]),
        "argument keep: the model is in bfloat16 itself",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_in_a_sentence(what: str) -> None:
    build, said = REFUSED[what]
    with pytest.raises(ValueError) as refused:
        build()
    assert said in str(refused.value)


def test_a_wrong_choice_of_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESFUSE_CPU_ISA", "avx3")
    with pytest.raises(ValueError, match="RESFUSE_CPU_ISA: 'avx3'; accepted: bf16, fp32"):
        build_engine(small(), X, precision="bf16")


def test_a_file_for_other_instructions_is_refused(
    timings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native_library.bf16_isa() != "bf16":
        pytest.skip("this processor has no AVX512-BF16")
    build_engine(small(), X, precision="bf16", timings=timings).save(tmp_path / "engine")
    monkeypatch.setenv("RESFUSE_CPU_ISA", "fp32")
    with pytest.raises(ValueError, match=r"bf16 arithmetic bf16; here it is fp32\. Build it again"):
        load_engine(tmp_path / "engine")


TAMPERED: dict[str, tuple[str, str]] = {
    "a conversion to what it reads": ('"dtype": "bfloat16"}', '"dtype": "float32"}'),
    "a convolution of float32 on bfloat16": ('"math_mode": "bf16"', '"math_mode": "ieee"'),
    "a conversion left out": ('["input:bf16"]', '["input"]'),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_changed_file_is_refused(what: str, timings: Path, tmp_path: Path) -> None:
    path = tmp_path / "engine"
    build_engine(small(), X, precision="bf16", timings=timings).save(path)
    with safe_open(path, framework="pt") as file:
        text = file.metadata()["resfuse"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert load_engine(path).precision == "bf16"
    graph = json.loads(text)["plans"]["1x3x8x8"]["graph"]
    changed = json.dumps(graph).replace(*TAMPERED[what])
    assert changed != json.dumps(graph)
    changed = text.replace(json.dumps(graph), changed)
    save_file(tensors, path, metadata={"resfuse": changed, "sha256": _digest(changed, tensors)})
    with pytest.raises(ValueError, match="no plan that can be run"):
        load_engine(path)
