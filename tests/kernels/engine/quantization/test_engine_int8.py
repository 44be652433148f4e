"""`build_engine(model, example, precision="int8", calibration=images)`: float32 in and out, 8-bit
integers between.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from resfuse.kernels import Engine, build_engine, calibrate, load_engine
from resfuse.kernels.cpu import library as native_library
from resfuse.kernels.cpu.library import NativeUnavailable
from resfuse.kernels.engine.frontend.conversions import moves
from resfuse.kernels.engine.ir.graph import Concat, Conv, Convert, MaxPool, Torch
from resfuse.kernels.engine.saving.engine_file import _digest
from resfuse.kernels.engine.tactics import eager
from test_engine_bf16 import gated, mobilenet

pytestmark = [pytest.mark.usefixtures("kept_exports"), pytest.mark.slow]


class Joined(nn.Module):
    """Concatenations within concatenations, a shuffle, pools, slopes and odd channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slope = nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.PReLU(32)
        self.left, self.right = nn.Conv2d(32, 16, 1), nn.Conv2d(32, 48, 3, padding=1)
        self.norm = nn.BatchNorm2d(96)
        self.odd = nn.Conv2d(96, 37, (1, 3), padding=(0, 1), dilation=(1, 1))
        self.last = nn.Conv2d(37, 10, 3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.slope(self.first(x))
        inner = torch.cat([F.relu(self.left(y)), F.relu(self.right(y))], 1)
        z = torch.cat([inner, F.max_pool2d(y, 3, 1, 1)], 1)
        z = F.channel_shuffle(F.relu(self.norm(z)), 4)
        z = F.avg_pool2d(F.leaky_relu(self.odd(z), 0.2), 3, 2, 1)
        maps = F.interpolate(self.last(z), scale_factor=2, mode="bilinear")
        return maps, F.softmax(maps.mean((2, 3)), 1)


def resnet() -> nn.Module:
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": resnet,
    "MobileNetV2's blocks": mobilenet,
    "squeeze and excitation": gated,
    "concatenations": Joined,
}


@functools.cache
def network(name: str) -> nn.Module:
    """A network with batch norms that fit photograph-like inputs, which no test changes."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        for seed in range(3):
            model(images(8, seed=100 + seed))
    return model.eval()


def images(count: int, size: int = 64, seed: int = 0) -> Tensor:
    """Smooth images, as photographs are, with channels of different ranges."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bicubic")
    return (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)) * torch.tensor(
        [1.0, 0.8, 1.3]
    ).view(1, 3, 1, 1)


def int8_engine(name: str, batch: int, **options: object) -> Engine:
    given = {"calibration": images(48, seed=1)} | options
    return build_engine(network(name), images(batch, seed=7), precision="int8", **given)


@functools.cache
def usual_engine(name: str, batch: int) -> Engine:
    """An engine without options, which no test changes."""
    return int8_engine(name, batch)


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    network.cache_clear()
    usual_engine.cache_clear()


def sqnr(y: Tensor, want: Tensor) -> float:
    """The ratio of signal to noise of the worst image, in dB."""
    noise = (y.double() - want.double()).flatten(1).square().sum(1)
    return float((10 * torch.log10(want.double().flatten(1).square().sum(1) / noise)).min())


def outputs(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else y


def by_twins(engine: Engine, x: Tensor) -> list[Tensor]:
    """What the engine's graph computes by the plain-torch twins of its kernels."""
    (graph,) = engine.graphs
    with torch.inference_mode():
        return eager.exact(graph, engine._weights(), [x])


# The worst image's SQNR that each network reaches, in dB, less some 3 dB: float32 has 130.
LEAST_SQNR = {
    "ResNet": 20.0,
    "MobileNetV2's blocks": 18.0,
    "squeeze and excitation": 32.0,
    "concatenations": 25.0,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_an_engine_in_int8_is_near_the_model_and_equals_its_twins(name: str, batch: int) -> None:
    x = images(batch, seed=7)
    engine = usual_engine(name, batch)
    with torch.no_grad():
        want = outputs(network(name)(x))
    answers = outputs(engine(x))
    for y, exact, twin in zip(answers, want, by_twins(engine, x), strict=True):
        assert y.dtype == torch.float32
        assert sqnr(y, exact) > LEAST_SQNR[name]
        assert sqnr(y, twin) > 40  # ties alone: a step here and there
        assert not torch.equal(y, exact)


def test_convolutions_compute_in_int8_and_what_torch_computes_sees_float32() -> None:
    engine = usual_engine("concatenations", 1)
    (graph,) = engine.graphs
    assert engine.precision == "int8"
    for node in graph.nodes:
        dtypes = {graph.values[name].dtype for name in node.inputs}
        if isinstance(node.op, Conv):
            assert dtypes == {torch.uint8}
        elif isinstance(node.op, Torch) and not moves(node):
            assert dtypes == {torch.float32}
        elif isinstance(node.op, Concat | MaxPool):
            scales = {graph.values[name].quantization for name in (*node.inputs, node.name)}
            assert len(scales) == 1  # so that parts can lie in their whole
    last = next(node for node in graph.nodes if "last" in getattr(node.op, "weight", ""))
    assert graph.values[last.name].dtype == torch.float32  # without a rounding of its own
    assert sum(isinstance(node.op, Convert) for node in graph.nodes) == 1  # of the input


def test_weights_in_int8_take_a_quarter_of_the_memory() -> None:
    engine = int8_engine("ResNet", 1, keep_weights=False)
    own = sum(p.numel() for p in network("ResNet").parameters()) * 4
    assert engine.memory().weights_bytes < 0.3 * own


def test_a_saved_engine_answers_the_same(tmp_path: Path) -> None:
    x, engine = images(3, seed=7), usual_engine("squeeze and excitation", 3)
    engine.save(tmp_path / "engine.safetensors")
    loaded = load_engine(tmp_path / "engine.safetensors")
    assert loaded.precision == "int8"
    assert torch.equal(loaded(x), engine(x))
    assert "int8" in loaded.quantization()


@pytest.mark.parametrize(
    "changed",
    [
        {"scale": 0.0, "zero_point": 0},
        {"scale": 1e300, "zero_point": 0},
        {"scale": 0.1, "zero_point": 256},
        {},
    ],
)
def test_a_file_whose_values_make_no_sense_is_refused(
    tmp_path: Path, changed: dict[str, float]
) -> None:
    path = tmp_path / "engine"
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1)), images(1)
    build_engine(model.eval(), x, precision="int8", calibration=images(32)).save(path)
    with safe_open(path, "pt") as file:
        plan = json.loads(file.metadata()["resfuse"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    values = plan["plans"]["1x3x64x64"]["graph"]["values"]
    name = next(name for name, value in values.items() if "scale" in value)
    values[name] = {k: v for k, v in values[name].items() if k in ("shape", "dtype")} | changed
    text = json.dumps(plan)
    save_file(tensors, path, {"resfuse": text, "sha256": _digest(text, tensors)})
    with pytest.raises(ValueError, match="no plan that can be run"):
        load_engine(path)


def test_layers_to_keep_are_computed_in_float32() -> None:
    engine = int8_engine("ResNet", 1, keep=["layer4.*", "fc"])
    (graph,) = engine.graphs
    for node in graph.nodes:
        if isinstance(node.op, Conv):
            wide = graph.values[node.inputs[0]].dtype == torch.float32
            assert wide == node.op.weight.startswith(("layer4", "fc"))
    kept = [line for line in engine.quantization().splitlines() if line.endswith("asked for")]
    assert len(kept) == 4


def test_the_layers_that_quantisation_harms_most_are_kept_for_a_small_error() -> None:
    coarse = usual_engine("MobileNetV2's blocks", 3)
    fine = int8_engine("MobileNetV2's blocks", 3, max_error=0.03)
    kept = [line for line in fine.quantization().splitlines() if line.endswith("max_error")]
    layers = sum(isinstance(node.op, Conv) for node in fine.graphs[0].nodes)
    assert 0 < len(kept) < layers
    x = images(15, seed=1)
    with torch.no_grad():
        want = network("MobileNetV2's blocks")(x)

    def error(engine: Engine) -> float:
        y = torch.cat([engine(part) for part in x.split(3)])
        return float((y - want).norm() / want.norm())

    assert error(fine) <= 0.035 < error(coarse)


def test_ranges_serve_other_batches(tmp_path: Path) -> None:
    model = network("ResNet")
    ranges = calibrate(model, images(48, seed=1))
    ranges.save(tmp_path / "ranges.json")
    x = images(3, seed=7)
    again = type(ranges).load(tmp_path / "ranges.json")
    one = build_engine(model, x, precision="int8", calibration=again, batch_sizes=[1, 3])
    assert torch.equal(one(x), usual_engine("ResNet", 3)(x))
    assert torch.equal(one(x[:1]), one(x)[:1])


def test_a_batch_is_filled_up() -> None:
    engine, x = int8_engine("ResNet", 4, other_batches="pad"), images(4, seed=7)
    assert torch.equal(engine(x[:3]), engine(x)[:3])


def test_nan_becomes_a_number() -> None:
    x, engine = images(1, seed=7), usual_engine("ResNet", 1)
    x[0, 0, 0, 0] = math.nan
    assert engine(x).isfinite().all()


def test_without_a_compiler_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, engine = images(1, seed=7), usual_engine("squeeze and excitation", 1)

    def none(*_: object) -> None:
        raise NativeUnavailable("there is no compiler")

    monkeypatch.setattr(native_library, "library", none)
    monkeypatch.setattr(native_library, "library_for", none)
    plain = int8_engine("squeeze and excitation", 1)
    assert sqnr(plain(x), engine(x)) > 40


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int8"}, "argument calibration: None"),
        ({"calibration": images(32)}, "given without precision='int8'"),
        ({"max_error": 0.1}, "given without precision='int8'"),
        ({"precision": "int8", "calibration": images(32), "max_error": 0}, "argument max_error: 0"),
        ({"precision": "int8", "calibration": images(32), "keep": ["no"]}, "'no' matches no"),
        ({"precision": "int4"}, "accepted: fp32, bf16, int8"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_engine(network("squeeze and excitation"), images(1), **options)


def test_ranges_of_another_model_are_refused() -> None:
    ranges = calibrate(network("ResNet"), images(32))
    with pytest.raises(ValueError, match="another model"):
        build_engine(network("concatenations"), images(1), precision="int8", calibration=ranges)


def test_ranges_cannot_be_judged_by_an_error() -> None:
    model = network("squeeze and excitation")
    ranges = calibrate(model, images(32))
    with pytest.raises(ValueError, match="given with ranges"):
        build_engine(model, images(1), precision="int8", calibration=ranges, max_error=0.1)


def test_other_weights_are_refused() -> None:
    weights = network("squeeze and excitation").state_dict()
    with pytest.raises(ValueError, match="takes no new weights"):
        usual_engine("squeeze and excitation", 1).refresh(weights)


def test_a_model_in_training_mode_is_refused() -> None:
    model = deepcopy(network("ResNet")).train()
    with pytest.raises(ValueError, match="training mode"):
        build_engine(model, images(1), precision="int8", calibration=images(32))
