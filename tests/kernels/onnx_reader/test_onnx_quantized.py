"""Quantised files: what ONNX Runtime's quantize_static, NNCF and `Engine.export_onnx` write."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto, helper

from onnx_files import file_of, images, node
from quantized_networks import (
    by_nncf,
    by_onnxruntime,
    of_onnxruntime,
    require_each_step_alike,
    smooth_images,
)
from resfuse.kernels import fuse, load_onnx
from resfuse.kernels.onnx_reader.operators.quantize_linear import FakeQuantize

U8, S8 = np.uint8, np.int8
SHAPE = ("n", 4, 8, 8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.onnx"


def as_the_file_says(path: Path, x: np.ndarray) -> np.ndarray:
    (y,) = of_onnxruntime(path, torch.from_numpy(x))
    found: np.ndarray = y.numpy()
    return found


def answer(module: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = module(torch.from_numpy(x)).numpy()
    return found


def pair(x: str = "x", y: str = "y", *stored: str) -> list[Any]:
    names = list(stored or ("s", "z"))
    return [
        node("QuantizeLinear", [x, *names], [f"{y}_q"]),
        node("DequantizeLinear", [f"{y}_q", *names], [y]),
    ]


@pytest.mark.parametrize("zero", [U8(0), U8(255), U8(77), S8(-128), S8(0), S8(5), None])
@pytest.mark.parametrize("opset", [10, 13, 19, 21, 25])
def test_an_activation_is_rounded_as_onnx_says(
    zero: np.integer | None, opset: int, path: Path
) -> None:
    """Halves, infinities, and the numbers beside the limits included."""
    scale = np.float32(0.1)
    x = np.arange(-700, 700, dtype=np.float32) * (scale / 2)
    x = np.concatenate([x, np.nextafter(x, np.float32(9e9)), [np.inf, -np.inf, 1e30]])
    x = x.astype(np.float32).reshape(1, -1)
    given = {"s": scale} | ({} if zero is None else {"z": zero})
    names = list(given)
    file_of(path, pair("x", "y", *names), x.shape, given, opset=opset)
    np.testing.assert_array_equal(answer(load_onnx(path), x), as_the_file_says(path, x))


def test_nan_stays_nan(path: Path) -> None:
    file_of(path, pair(), (1, 2), {"s": np.float32(0.5), "z": U8(3)})
    y = answer(load_onnx(path), np.array([[np.nan, 1.2]], np.float32))
    assert np.isnan(y[0, 0])
    assert y[0, 1] == 1.0


def convolution(
    stored: type = S8, axis: int = 0, seed: int = 0
) -> tuple[list[Any], dict[str, Any]]:
    """Quantised from the input to the output, with weights, scales and a bias in integers."""
    draw = np.random.default_rng(seed)
    limits = np.iinfo(stored)
    scales = draw.uniform(0.01, 0.02, 4).astype(np.float32)
    given = {
        "w": draw.integers(limits.min, limits.max + 1, (4, 4, 3, 3)).astype(stored),
        "ws": scales, "wz": np.full(4, 128 if stored is U8 else 0, stored),
        "b": draw.integers(-9999, 9999, 4).astype(np.int32),
        "bs": scales * np.float32(0.02), "bz": np.zeros(4, np.int32),
        "s": np.float32(0.02), "z": U8(120), "t": np.float32(0.11), "u": U8(9),
    }  # fmt: skip
    nodes = [
        *pair("x", "xd"),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=axis),
        node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
        node("Conv", ["xd", "wd", "bd"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        *pair("r", "y", "t", "u"),
    ]
    return nodes, given


@pytest.mark.parametrize("stored", [S8, U8])
@pytest.mark.parametrize("axis", [0, 1, -4])
def test_weights_become_the_numbers_that_they_stand_for(
    stored: type, axis: int, path: Path
) -> None:
    nodes, given = convolution(stored, axis)
    file_of(path, nodes, SHAPE, given)
    module, x = load_onnx(path), images((2, 4, 8, 8))
    y, want = answer(module, x), as_the_file_says(path, x)
    assert np.abs(y - want).max() < 1e-6  # at a tie it would be a step
    (layer,) = (each for each in module.modules() if isinstance(each, nn.Conv2d))
    around = [1, 1, 1, 1]
    around[axis] = 4
    whole = given["w"].astype(np.int64) - int(given["wz"][0])
    np.testing.assert_array_equal(
        layer.weight.detach().numpy(), (whole * given["ws"].reshape(around)).astype(np.float32)
    )
    assert layer.bias is not None
    np.testing.assert_array_equal(
        layer.bias.detach().numpy(), given["b"].astype(np.float32) * given["bs"]
    )
    assert sum(isinstance(each, FakeQuantize) for each in module.modules()) == 2


def test_weights_in_floating_point_with_both_nodes_are_rounded(path: Path) -> None:
    draw = np.random.default_rng(0)
    given = {
        "w": (draw.standard_normal((4, 4, 1, 1)) * 3).astype(np.float32),
        "s": np.array([0.02, 0.03, 0.01, 0.5], np.float32), "z": np.zeros(4, S8),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["w", "s", "z"], ["wq"], axis=0),
        node("DequantizeLinear", ["wq", "s", "z"], ["wd"], axis=0),
        node("Conv", ["x", "wd"]),
    ]
    file_of(path, nodes, SHAPE, given)
    x = images((2, 4, 8, 8))
    module = load_onnx(path)
    np.testing.assert_allclose(answer(module, x), as_the_file_says(path, x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(each, FakeQuantize) for each in module.modules())


def test_a_fused_module_answers_the_same(path: Path) -> None:
    nodes, given = convolution()
    file_of(path, nodes, SHAPE, given)
    module, x = load_onnx(path), images((2, 4, 8, 8))
    y = answer(fuse(module), x)
    assert np.abs(y - as_the_file_says(path, x)).max() < 1.01 * given["t"]


# Files of other tools.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet", "MobileNetV2's blocks"])
@pytest.mark.parametrize("activations", ["QUInt8", "QInt8"])
def test_a_file_of_onnxruntimes_quantizer(name: str, activations: str, path: Path) -> None:
    by_onnxruntime(name, path, activations)
    require_each_step_alike(path, smooth_images(4, seed=9))


@pytest.mark.slow
def test_a_file_of_nncf(path: Path) -> None:
    pytest.importorskip("nncf")
    by_nncf("ResNet", path)
    require_each_step_alike(path, smooth_images(4, seed=9))


@pytest.mark.slow
def test_nncfs_scales_for_each_channel_of_a_depthwise_convolution(path: Path) -> None:
    pytest.importorskip("nncf")
    by_nncf("MobileNetV2's blocks", path)
    refused(path, r"an activation with 32 scales, one a channel, is not read")


# What is refused: whatever it is, in a sentence.

SCALE, ZERO = np.float32(0.02), U8(120)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "zero": ({"s": np.float32(0)}, r"a scale of 0\.0 is not read"),
    "negative": ({"s": np.float32(-0.1)}, r"a scale of -0\.1"),
    "NaN": ({"s": np.float32(np.nan)}, "a scale of nan"),
    "infinite": ({"s": np.float32(np.inf)}, "a scale of inf"),
    "of each channel": (
        {"s": np.full(4, SCALE), "z": np.full(4, ZERO)}, "an activation with 4 scales",
    ),
    "of a matrix": ({"s": np.full((2, 2), SCALE)}, r"a scale of shape \[2, 2\]"),
    "of none": ({"s": np.zeros(0, np.float32)}, r"a scale of shape \[0\]"),
    "in double": ({"s": np.float64(0.1)}, "a scale of type float64"),
    "in half": ({"s": np.float16(0.1)}, "with a scale of float16"),
    "16 bits": ({"z": np.int16(0)}, "a zero point of type int16"),
    "32 bits": ({"z": np.int32(0)}, "a zero point of type int32"),
    "several zero points": ({"z": np.zeros(4, U8)}, r"a zero point of \[4\] for \[\] scales"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_activation_that_is_refused(name: str, path: Path) -> None:
    changes, said = REFUSED[name]
    file_of(path, pair(), SHAPE, {"s": SCALE, "z": ZERO} | changes)
    refused(path, said)


WEIGHTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "axis": ({}, 4, r"4 scales along axis 4 of \[4, 4, 3, 3\]"),
    "axis below": ({}, -5, r"4 scales along axis -5"),
    "another size": ({}, 2, r"4 scales along axis 2"),
    "zero": ({"ws": np.array([0.1, 0.1, 0, 0.1], np.float32)}, 0, r"a scale of 0\.0"),
    "unlike": ({"wz": np.zeros(4, U8)}, 0, "a zero point of type uint8 for int8"),
    "few": ({"wz": np.zeros(3, S8)}, 0, r"a zero point of \[3\] for \[4\] scales"),
    "bias": ({"bz": np.ones(4, np.int32)}, 0, "a zero point of int32 other than 0"),
    "16 bits": (
        {"w": np.ones((4, 4, 3, 3), np.int16), "wz": np.zeros(4, np.int16)}, 0,
        "a weight of int16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_is_refused(name: str, path: Path) -> None:
    changes, axis, said = WEIGHTS[name]
    nodes, given = convolution(axis=axis)
    file_of(path, nodes, SHAPE, given | changes)
    refused(path, said)


def refused(path: Path, said: str) -> None:
    with pytest.raises(ValueError, match=said) as found:
        load_onnx(path)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


NODES: dict[str, tuple[list[Any], int, str]] = {
    "no scale": ([node("QuantizeLinear", ["x"])], 13, "a scale that is left out"),
    "a computed scale": (
        [node("ReduceMax", ["x"], ["m"], keepdims=0), *pair("x", "y", "m", "z")], 13,
        "a scale that is computed while the network runs",
    ),
    "no second half": ([node("QuantizeLinear", ["x", "s", "z"])], 13, "'y' is quantised"),
    "another half": (
        [pair()[0], node("DequantizeLinear", ["y_q", "t", "z"])], 13, "another scale",
    ),
    "another zero point": (
        [pair()[0], node("DequantizeLinear", ["y_q", "s"])], 13, "another scale or zero point",
    ),
    "integers between": (
        [pair()[0], node("Relu", ["y_q"], ["r"]), node("DequantizeLinear", ["r", "s", "z"])], 14,
        "a quantised activation without a DequantizeLinear",
    ),
    "no first half": ([node("DequantizeLinear", ["x", "s", "z"])], 13, "no QuantizeLinear"),
    "blocks": (
        [node("QuantizeLinear", ["x", "s", "z"], ["q"], block_size=2)], 21, "block_size=2",
    ),
    "another type": (
        [node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=TensorProto.INT4)], 21,
        "the output type INT4",
    ),
    "eight bits of floating point": (
        [node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=TensorProto.FLOAT8E4M3FN)], 21,
        "the output type FLOAT8E4M3FN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_nodes_that_are_refused(name: str, path: Path) -> None:
    nodes, opset, said = NODES[name]
    given = {"s": SCALE, "z": ZERO, "t": np.float32(0.03)}
    file_of(path, nodes, SHAPE, given, opset=opset)
    refused(path, said)


def test_zero_points_in_other_types_are_refused_by_name(path: Path) -> None:
    nodes, given = convolution()
    file_of(path, nodes, SHAPE, given)
    model = onnx.load(path)
    (index,) = (i for i, t in enumerate(model.graph.initializer) if t.name == "w")
    for kind, name in ((TensorProto.INT4, "INT4"), (TensorProto.FLOAT8E4M3FN, "FLOAT8E4M3FN")):
        small = helper.make_tensor("w", kind, (4, 4, 3, 3), np.zeros(144))
        model.graph.initializer[index].CopyFrom(small)
        path.write_bytes(model.SerializeToString())
        refused(path, rf"weight 'w' is of type {name}, which is not read")


def test_a_weight_that_many_nodes_read_takes_no_memory_without_bound(path: Path) -> None:
    """A file of a megabyte could ask for a terabyte."""
    reads = [
        node("DequantizeLinear", ["w", "s", "z"], [f"w{i}"]) for i in range(2**31 // 2**20 + 1)
    ]
    given = {"w": np.zeros((1024, 1024), S8), "s": np.float32(1), "z": S8(0)}
    file_of(path, [*reads, node("Relu", ["x"])], SHAPE, given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resfuse.kernels.onnx_reader.reading.constants.MOST_WEIGHTS", 2**22)
        refused(path, "more than 4194304 quantised weights would be unpacked")


def test_weights_with_nan_are_refused(path: Path) -> None:
    given = {"w": np.full((4, 4, 1, 1), np.nan, np.float32), "s": SCALE, "z": S8(0)}
    nodes = [
        node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("Conv", ["x", "d"]),
    ]
    file_of(path, nodes, SHAPE, given)
    refused(path, "with NaN in it")
