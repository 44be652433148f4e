"""`build_engine(load_onnx(path), x)` of a quantised file computes in int8 by the file's scales."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from quantized_networks import (
    NETWORKS,
    by_nncf,
    by_onnxruntime,
    listed,
    network,
    of_onnxruntime,
    relative_error,
    smooth_images,
)
from resfuse.kernels import Engine, build_engine, load_engine, load_onnx
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.graph import Conv, Graph, Torch
from resfuse.kernels.engine.quantization.given_scales import with_given_scales
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.onnx_reader.operators.quantize_linear import FakeQuantize
from resfuse.kernels.ops.quantization import Quantization, quantize_weights


def convolutions(graph: Graph) -> list[torch.dtype]:
    """The dtype that each convolution and linear layer reads."""
    return [graph.values[n.inputs[0]].dtype for n in graph.nodes if isinstance(n.op, Conv)]


def rewritten(model: nn.Module, x: Tensor) -> tuple[Graph, Tensor, Tensor]:
    """The graph of a model on integers, its answer by the twins of the kernels, and the model's."""
    graph, state = capture(model.eval(), x)
    narrow = with_given_scales(graph, state)
    values = {narrow.input: x}
    with torch.inference_mode():
        for node in narrow.nodes:
            function = eager.function_of(node, narrow.values, state)
            values[node.name] = function(*(values[name] for name in node.inputs))
        return narrow, values[narrow.outputs[0]], model(x)


def require_near(engine: Engine, path: Path, x: Tensor) -> None:
    """See require_each_step_alike for why they are no nearer."""
    (want,) = of_onnxruntime(path, x)
    errors = [relative_error(y, w) for y, w in zip(engine(x), want, strict=True)]
    assert max(errors) < 0.1
    assert min(errors) < 0.02  # images without a number halfway between two integers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet", "MobileNetV2's blocks"])
@pytest.mark.parametrize("activations", ["QUInt8", "QInt8"])
def test_a_file_of_onnxruntimes_quantizer(name: str, activations: str, tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", smooth_images(4, seed=9)
    by_onnxruntime(name, path, activations)
    engine = build_engine(load_onnx(path), x)
    assert engine.precision == "int8"
    (graph,) = engine.graphs
    assert set(convolutions(graph)) == {torch.uint8}
    calls = {node.op.target for node in graph.nodes if isinstance(node.op, Torch)}
    assert calls <= {"aten.reshape.default"}  # rounded before and behind it, it is no part of fc
    require_near(engine, path, x)
    with pytest.raises(ValueError, match="takes no new weights"):
        engine.refresh({})


@pytest.mark.slow
def test_a_file_of_nncf(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    path, x = tmp_path / "net.onnx", smooth_images(4, seed=9)
    by_nncf("ResNet", path)
    engine = build_engine(load_onnx(path), x)
    (graph,) = engine.graphs
    assert set(convolutions(graph)) == {torch.uint8}
    require_near(engine, path, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_engine_comes_back(name: str, tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", smooth_images(4, seed=7)
    given = smooth_images(40, seed=1)
    engine = build_engine(network(name), x, precision="int8", calibration=given)
    engine.export_onnx(path)
    again = build_engine(load_onnx(path), x)
    assert convolutions(again.graphs[0]) == convolutions(engine.graphs[0])
    scales = {value.quantization for value in again.graphs[0].values.values()}
    assert scales == {value.quantization for value in engine.graphs[0].values.values()}
    pairs = zip(listed(again(x)), listed(engine(x)), strict=True)
    for y, want in pairs:
        assert relative_error(y, want) < 0.05
    again.save(tmp_path / "engine")
    for y, want in zip(listed(load_engine(tmp_path / "engine")(x)), listed(again(x)), strict=True):
        assert torch.equal(y, want)


@pytest.mark.slow
def test_another_precision_can_be_asked_for(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", smooth_images(2, seed=9)
    by_onnxruntime("ResNet", path)
    engine = build_engine(load_onnx(path), x, precision="fp32")
    assert engine.precision == "fp32"
    require_near(engine, path, x)


class Rounded(nn.Module):
    """Convolutions between roundings; `change` makes one of the pieces another."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        for conv in (self.first, self.second):
            narrow, scale = quantize_weights(conv.weight.detach().double())
            if change != "weights":
                conv.weight.data = (narrow * scale.view(-1, 1, 1, 1)).float()
        self.x, self.y = FakeQuantize(0.03, 117, 0, 255), FakeQuantize(0.02, 0, 0, 255)
        self.z = FakeQuantize(0.04, -7, -128, 127)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(self.x(x)))
        if self.change == "read in float as well":
            return self.z(self.second(self.y(y))) + y
        if self.change == "not rounded":
            return self.z(self.second(y))
        if self.change == "rounded twice":
            return self.z(self.second(self.y(y))) + self.x(y)
        if self.change == "seven bits":
            y = torch.clamp(torch.round(y / 0.05), 0.0, 127.0) * 0.05
            return self.z(self.second(y))
        if self.change == "two scales":
            y = torch.clamp(torch.round(y / 0.05), 0.0, 255.0) * 0.025
            return self.z(self.second(y))
        if self.change == "pooled":
            y = F.max_pool2d(self.y(y), 2)
            return self.z(self.second(torch.cat([y, y.flip(1)], 1)[:, 4:12]))
        return self.z(self.second(self.y(y)))


# What each convolution reads.
CHANGES = {
    "": ["uint8", "uint8"],
    "weights": ["float32", "float32"],
    "read in float as well": ["uint8", "uint8"],
    "not rounded": ["uint8", "float32"],
    "rounded twice": ["uint8", "uint8"],
    "seven bits": ["uint8", "float32"],
    "two scales": ["uint8", "float32"],
    "pooled": ["uint8", "uint8"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_else_is_rounded(change: str) -> None:
    graph, y, want = rewritten(Rounded(change), torch.randn(2, 3, 9, 9))
    assert [str(dtype) for dtype in convolutions(graph)] == [f"torch.{d}" for d in CHANGES[change]]
    # ties of the last rounding, whose step is 0.04, and nothing but ties
    assert (y - want).abs().max() < 0.041
    assert ((y - want).abs() > 1e-5).float().mean() < 0.002


def test_integers_from_minus_128_are_stored_128_larger() -> None:
    graph, *_ = rewritten(Rounded(), torch.randn(2, 3, 9, 9))
    found = {value.quantization for value in graph.values.values()}
    assert Quantization(0.04, 121) in found


@pytest.mark.parametrize("most", [127, 63, 64, 100])
def test_weights_that_are_integers_are_not_rounded_again(most: int) -> None:
    """NNCF's are of seven bits where the CPU saturates; others do not reach 127 by chance."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randint(-most, most + 1, (6, 5, 3, 3), generator=draw)
    whole[:, 0, 0, 0], whole[5] = most, 0
    scale = torch.tensor([0.1, 0.013, 7e-5, 1.0, 0.3, 1.0])
    weight = (whole * scale.view(-1, 1, 1, 1)).float().double()
    narrow, found = quantize_weights(weight)
    again = narrow * found.view(-1, 1, 1, 1)
    torch.testing.assert_close(again, weight, rtol=1e-6, atol=0)
    if most > 63:  # half the scale is as exact
        assert torch.equal(narrow, whole.to(torch.int8))


def test_a_model_that_rounds_nothing_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    graph, state = capture(model, torch.randn(1, 3, 8, 8))
    assert with_given_scales(graph, state) is graph
