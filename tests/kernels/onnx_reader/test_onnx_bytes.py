"""Files whose input is uint8: a Cast or a DequantizeLinear makes floats of the pixels, and the
module, `fuse` and the engine take them as the file does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto

from onnx_files import file_of, node, require_equal, weights
from resfuse.kernels import build_engine, calibrate, fuse, load_onnx

pytestmark = pytest.mark.usefixtures("own_cache")

U8 = TensorProto.UINT8
CAST = [node("Cast", ["x"], ["f"], to=TensorProto.FLOAT)]
# From the pixels x [N, H, W, C], or [N, C, H, W], to the floats f [N, C, H, W].
STARTS: dict[str, tuple[tuple[int, ...], list[Any], dict[str, Any]]] = {
    "cast": ((3, 9, 8), CAST, {}),
    "cast and normalised": (
        (3, 9, 8),
        [
            node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
            node("Sub", ["a", "mean"], ["b"]),
            node("Div", ["b", "std"], ["f"]),
        ],
        {
            "mean": np.float32([[[[124]], [[116]], [[104]]]]),
            "std": np.float32([[[[58]], [[57]], [[57.5]]]]),
        },
    ),
    "channels moved in front of the cast": (
        (9, 8, 3),
        [
            node("Transpose", ["x"], ["a"], perm=[0, 3, 1, 2]),
            node("Gather", ["a", "bgr"], ["b"], axis=1),
            node("Cast", ["b"], ["f"], to=TensorProto.FLOAT),
        ],
        {"bgr": np.int64([2, 1, 0])},
    ),
    "one scale": (
        (3, 9, 8),
        [node("DequantizeLinear", ["x", "s", "z"], ["f"])],
        {"s": np.float32(1 / 127), "z": np.uint8(128)},
    ),
    "a scale for each colour": (
        (3, 9, 8),
        [node("DequantizeLinear", ["x", "s", "z"], ["f"], axis=1)],
        {"s": np.float32([0.01, 0.02, 0.015]), "z": np.uint8([124, 116, 104])},
    ),
    "a scale of one": (
        (3, 9, 8), [node("DequantizeLinear", ["x", "s"], ["f"])], {"s": np.float32(1)},
    ),
}  # fmt: skip


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def network(path: Path, start: str) -> tuple[Path, tuple[int, ...]]:
    shape, nodes, given = STARTS[start]
    rest = [
        node("Conv", ["f", "w"], ["c"], pads=[1] * 4),
        node("Relu", ["c"], ["r"]),
        node("GlobalAveragePool", ["r"]),
    ]
    return of_bytes(path, [*nodes, *rest], shape, given | {"w": weights(8, 3, 3, 3)}), shape


def of_bytes(path: Path, nodes: Sequence[Any], shape: Sequence[int], given: Any = None) -> Path:
    return file_of(
        path / "bytes.onnx", nodes, ["n", *shape], given, dtype=U8, out_dtype=TensorProto.FLOAT
    )


@pytest.mark.parametrize("start", STARTS)
def test_pixels_are_read_as_the_file_says(start: str, tmp_path: Path) -> None:
    path, shape = network(tmp_path, start)
    module = load_onnx(path)
    assert module.meta["batch_size"] is None
    for batch in (1, 2, 3):
        require_equal(module, path, pixels(batch, *shape, seed=batch), atol=2e-3, rtol=2e-5)


@pytest.mark.parametrize("start", STARTS)
def test_fuse_and_the_engine_take_pixels(start: str, tmp_path: Path) -> None:
    path, shape = network(tmp_path, start)
    module, x = load_onnx(path), torch.from_numpy(pixels(2, *shape))
    with torch.inference_mode():
        want = module(x)
        fused = fuse(module)(x)
    engine = build_engine(module, x)
    for y in (fused, engine(x)):
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    with pytest.raises(
        ValueError, match=r"argument x: torch\.float32; this engine takes torch\.uint8"
    ):
        engine(x.float())


def test_floats_are_no_pixels(tmp_path: Path) -> None:
    module = load_onnx(network(tmp_path, "cast")[0])
    with pytest.raises(AssertionError, match=r"takes images in torch\.uint8, as its file says"):
        module(torch.rand(1, 3, 9, 8))
    with pytest.raises(ValueError, match=r"argument images: batch 0 is torch\.uint8; accepted"):
        calibrate(module, torch.from_numpy(pixels(32, 3, 9, 8)))


@pytest.mark.parametrize(
    ("nodes", "given", "said"),
    [
        ([node("Resize", ["x", "", "sizes"], ["a"]), node("Cast", ["a"], to=1)],
         {"sizes": np.float32([1, 1, 2, 2])}, r"\(Resize, opset 13\): an operator on numbers in"),
        ([node("MaxPool", ["x"], ["a"], kernel_shape=[2, 2]), node("Cast", ["a"], to=1)], {},
         r"\(MaxPool, opset 13\): an operator on numbers in uint8 other than Cast, Deq"),
        ([node("Conv", ["x", "w"])], {"w": weights(8, 3, 3, 3)}, r"\(Conv, opset 13\): an op"),
        ([node("DequantizeLinear", ["x", "s", "z"])],
         {"s": np.float32(0.5), "z": np.int8(3)}, "a zero point of type int8 for uint8"),
        ([node("DequantizeLinear", ["x", "s"], axis=1)], {"s": np.float32([0.5, 1])},
         r"2 scales along axis 1 of \[1, 3, 9, 8\]"),
    ],
)  # fmt: skip
def test_what_is_refused_of_bytes(
    nodes: list[Any], given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        load_onnx(of_bytes(tmp_path, nodes, (3, 9, 8), given))


def test_an_engine_of_pixels_comes_back_from_its_file(tmp_path: Path) -> None:
    """`export_onnx` writes a file that takes uint8 where the engine does."""
    from resfuse.kernels import Pixels

    path = file_of(
        tmp_path / "plain.onnx",
        [node("Conv", ["x", "w"], ["c"]), node("Relu", ["c"], ["r"]), node("Conv", ["r", "v"])],
        ["n", 3, 9, 8], {"w": weights(8, 3, 3, 3), "v": weights(4, 8, 1, 1)},
    )  # fmt: skip
    x = torch.from_numpy(pixels(2, 3, 9, 8))
    engine = build_engine(
        load_onnx(path), x, precision="int8", pixels=Pixels((0.5,) * 3, (0.25,) * 3),
        calibration=torch.from_numpy(pixels(32, 3, 9, 8, seed=1)),
    )  # fmt: skip
    engine.export_onnx(tmp_path / "int8.onnx")
    again = load_onnx(tmp_path / "int8.onnx")
    with torch.inference_mode():
        y = again(x)
    want = engine(x)
    assert float((y - want).norm() / want.norm()) < 0.02
    assert float((build_engine(again, x)(x) - want).norm() / want.norm()) < 0.02
