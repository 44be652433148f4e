"""`engine.export_onnx(path)`: other runtimes give the engine's answers, by the engine's scales."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx

from quantized_networks import (
    NETWORKS,
    listed,
    network,
    of_onnxruntime,
    relative_error,
    require_each_step_alike,
    smooth_images,
)
from resfuse.kernels import Engine, build_engine, load_onnx
from resfuse.kernels.engine.ir.graph import (
    AveragePool,
    Graph,
    GroupNorm,
    LayerNorm,
    MaxPool,
    Node,
    Operation,
    Pick,
    SplitSoftmax,
    SplitSum,
    Value,
)
from resfuse.kernels.engine.saving.onnx.onnx_writer import export_onnx
from resfuse.kernels.engine.tactics import eager

pytestmark = pytest.mark.slow


@functools.cache
def int8_engine(name: str, count: int = 4) -> Engine:
    """An engine that no test changes."""
    given = smooth_images(40, seed=1)
    return build_engine(network(name), smooth_images(count), precision="int8", calibration=given)


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    int8_engine.cache_clear()


def of_openvino(path: Path, x: Tensor) -> list[Tensor]:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    told = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(path), "CPU", told)
    return [torch.from_numpy(np.array(y)) for y in compiled(x.numpy()).values()]


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_other_runtimes_answer_as_the_engine_does(
    name: str, activations: str, tmp_path: Path
) -> None:
    path, engine, x = tmp_path / "net.onnx", int8_engine(name), smooth_images(4, seed=7)
    engine.export_onnx(path, activations)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    require_each_step_alike(path, x)
    want = listed(engine(x))
    for answers in (of_onnxruntime(path, x), listed(load_onnx(path)(x))):
        for y, exact in zip(answers, want, strict=True):
            assert y.shape == exact.shape
            errors = [relative_error(*pair) for pair in zip(y, exact, strict=True)]
            assert min(errors) < 1e-5  # 5e-7 of all where no number is halfway
            assert max(errors) < 0.1
            assert exact.dim() != 2 or torch.equal(y.argmax(1), exact.argmax(1))
    # Kernels for integers. Without VNNI oneDNN halves weights so that no sum of two products
    # saturates: OpenVINO is 8 to 10 % off on an EPYC Milan, ONNX Runtime 0 to 4 %.
    for answers in (of_onnxruntime(path, x, optimised=True), of_openvino(path, x)):
        for y, exact in zip(answers, want, strict=True):
            assert relative_error(y, exact) < 0.2


def test_both_ways_to_store_activations_give_the_same_numbers(tmp_path: Path) -> None:
    engine, x = int8_engine("gates"), smooth_images(4, seed=7)
    for activations in ("uint8", "int8"):
        engine.export_onnx(tmp_path / activations, activations)
    (unsigned,), (signed,) = (of_onnxruntime(tmp_path / a, x) for a in ("uint8", "int8"))
    assert torch.equal(unsigned, signed)
    points = {
        activations: {
            array.item()
            for tensor in onnx.load(tmp_path / activations).graph.initializer
            if tensor.name.endswith("/zero_point")
            for array in [onnx.numpy_helper.to_array(tensor)]
        }
        for activations in ("uint8", "int8")
    }
    assert points["int8"] == {point - 128 for point in points["uint8"]}


def test_the_batch_is_free_where_nothing_needs_it(tmp_path: Path) -> None:
    path, engine = tmp_path / "net.onnx", int8_engine("ResNet", count=2)
    engine.export_onnx(path)
    x = smooth_images(5, seed=7)
    (y,) = of_onnxruntime(path, x)
    want = torch.cat([engine(x[:2]), engine(x[2:4]), engine(x[3:])[1:]])
    errors = [relative_error(*pair) for pair in zip(y, want, strict=True)]
    assert min(errors) < 1e-5
    assert max(errors) < 0.1
    assert load_onnx(path).meta["batch_size"] is None


class AcrossImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.conv(x).flatten(2), 0)


class Rolled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(self.conv(x), 1, 2)


def test_what_mixes_images_has_a_fixed_batch(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", smooth_images(2)
    given = smooth_images(40, seed=1)
    engine = build_engine(AcrossImages().eval(), x, precision="int8", calibration=given)
    engine.export_onnx(path)
    assert load_onnx(path).meta["batch_size"] == 2
    (y,) = of_onnxruntime(path, x)
    assert relative_error(y, engine(x)) < 0.01


def test_an_operation_of_torchs_is_refused_by_name(tmp_path: Path) -> None:
    path, given = tmp_path / "net.onnx", smooth_images(40, seed=1)
    engine = build_engine(Rolled().eval(), smooth_images(1), precision="int8", calibration=given)
    path.write_text("an earlier file")
    with pytest.raises(ValueError, match=r"the network runs aten\.roll\.default"):
        engine.export_onnx(path)
    assert path.read_text() == "an earlier file"
    assert list(tmp_path.iterdir()) == [path]


def test_engines_and_arguments_that_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    with pytest.raises(ValueError, match="this engine computes in fp32; accepted: one in int8"):
        build_engine(model, smooth_images(1)).export_onnx(tmp_path / "net.onnx")
    given = smooth_images(40, seed=1)
    engine = build_engine(model, smooth_images(1), precision="int8", calibration=given)
    with pytest.raises(ValueError, match="argument activations: 'int4'; accepted: uint8, int8"):
        engine.export_onnx(tmp_path / "net.onnx", "int4")  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No such file"):
        engine.export_onnx(tmp_path / "missing" / "net.onnx")
    assert not list(tmp_path.iterdir())


OPERATIONS: dict[str, tuple[Operation, tuple[int, ...], tuple[int, ...]]] = {
    "a maximum beyond the edge": (
        MaxPool((3, 2), (2, 2), (1, 0), (1, 1), True), (2, 5, 8, 7), (2, 5, 5, 4),
    ),
    "a dilated maximum": (
        MaxPool((3, 3), (2, 1), (1, 1), (2, 1), True), (2, 5, 8, 7), (2, 5, 4, 7),
    ),
    "a mean beyond the edge": (
        AveragePool((3, 3), (2, 2), (1, 1), True, False), (2, 5, 8, 7), (2, 5, 5, 4),
    ),
    "a mean beyond the edge, padding counted": (
        AveragePool((3, 3), (2, 2), (1, 1), True, True), (2, 5, 8, 7), (2, 5, 5, 4),
    ),
    "a sum by another number": (
        AveragePool((2, 2), (2, 2), (1, 1), False, False, 3), (2, 5, 8, 6), (2, 5, 5, 4),
    ),
    "a pick": (
        Pick((0, 2, 4), (6, 6, 0), 3, (4, 1)), (2, 5, 8, 7), (2, 5, 3, 3),
    ),
    "a pick with zeros around": (
        Pick((0, 2, 4), (6, 0), 2, (4, 1), (1, 0, 2, 3)), (2, 5, 8, 7), (2, 4, 8, 3),
    ),
    "a pick of one": (Pick((7,), tuple(range(7))), (2, 5, 8, 7), (2, 5, 1, 7)),
    "a layer norm": (LayerNorm("weight", None, 1e-5), (2, 5, 8, 7), (2, 5, 8, 7)),
    "a group norm and ReLU": (
        GroupNorm(1, "weight", None, 1e-3, "relu"), (2, 5, 8, 7), (2, 5, 8, 7),
    ),
    "an instance norm": (GroupNorm(5, None, "weight", 1e-5), (2, 5, 8, 7), (2, 5, 8, 7)),
    "a group norm of a row": (GroupNorm(1, "weight", "weight", 1e-5), (2, 5), (2, 5)),
    "a sum of splits": (SplitSum(3), (2, 6, 8, 7), (2, 2, 8, 7)),
    "a softmax of splits": (SplitSoftmax(2), (2, 6, 8, 7), (2, 6, 8, 7)),
    "a softmax of splits of a row": (SplitSoftmax(3), (2, 6), (2, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_in_float32(name: str, tmp_path: Path) -> None:
    """Of those that a network in int8 may keep, with windows that runtimes differ in."""
    op, shape, of_y = OPERATIONS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    state = {"weight": torch.linspace(0.5, 2, 5)}
    values = {"x": Value(shape, torch.float32), "y": Value(of_y, torch.float32)}
    graph = Graph("x", ("y", "x", "y"), (Node("y", op, ("x",)),), values)
    path = tmp_path / "net.onnx"
    export_onnx(graph, state, path, "uint8")
    onnx.checker.check_model(onnx.load(path), full_check=True)
    want, *_ = eager.exact(graph, state, [x])
    for answers in (of_onnxruntime(path, x), of_openvino(path, x), list(load_onnx(path)(x))):
        y, same, again = answers
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-6)
        assert torch.equal(same, x)
        assert torch.equal(y, again)
