"""Every operator against ONNX Runtime, over the attributes and inputs that change what it means,
and the operator sets that say it differently."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto

from onnx_files import check, ints, node, weights

CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 3, 9, 8), (4, 3, 3, 3), {}),
    "stride and pads": ((2, 3, 9, 8), (4, 3, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "lopsided": ((2, 3, 9, 8), (4, 3, 3, 3), {"strides": [2, 1], "pads": [0, 1, 2, 0]}),
    "groups": ((2, 4, 9, 8), (6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ((2, 4, 9, 8), (4, 1, 3, 3), {"group": 4}),
    "dilated": ((2, 3, 9, 8), (4, 3, 3, 3), {"dilations": [2, 3], "pads": [2, 3, 2, 3]}),
    "same upper": ((2, 3, 9, 8), (4, 3, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same lower": ((2, 3, 9, 8), (4, 3, 2, 4), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "same of a stride beyond the kernel": (
        (2, 3, 9, 8), (4, 3, 1, 1), {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    ),
    "valid": ((2, 3, 9, 8), (4, 3, 3, 2), {"auto_pad": "VALID"}),
    "one dimension": ((2, 3, 9), (4, 3, 3), {"pads": [1, 0]}),
    "three dimensions": ((2, 3, 5, 6, 7), (4, 3, 3, 1, 2), {"pads": [1, 0, 0, 1, 0, 1]}),
}  # fmt: skip


@pytest.mark.parametrize("opset", [9, 11, 13, 18, 22])
@pytest.mark.parametrize("case", CONVS)
def test_conv(case: str, opset: int, tmp_path: Path) -> None:
    shape, of, how = CONVS[case]
    given = {"w": weights(*of), "b": weights(of[0])}
    inputs = ["x", "w", "b"] if opset > 9 else ["x", "w"]
    check(tmp_path / "a.onnx", [node("Conv", inputs, **how)], shape, given, opset=opset)


TRANSPOSED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 3, 5, 6), (3, 4, 2, 2), {"strides": [2, 2]}),
    "groups": ((2, 4, 5, 6), (4, 3, 3, 3), {"group": 2, "strides": [2, 1]}),
    "output padding": (
        (2, 3, 5, 6), (3, 4, 3, 3),
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 0]},
    ),
    "lopsided": ((2, 3, 5, 6), (3, 4, 4, 3), {"strides": [2, 2], "pads": [0, 1, 2, 0]}),
    "dilated": ((2, 3, 5, 6), (3, 4, 3, 3), {"dilations": [2, 1], "pads": [1, 1, 1, 1]}),
    "same upper": ((2, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    "same lower": ((2, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    "output shape": ((2, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "output_shape": [10, 12]}),
    "one dimension": ((2, 3, 9), (3, 2, 3), {"strides": [2]}),
}  # fmt: skip


@pytest.mark.parametrize("opset", [9, 11, 18])
@pytest.mark.parametrize("case", TRANSPOSED)
def test_conv_transpose(case: str, opset: int, tmp_path: Path) -> None:
    shape, of, how = TRANSPOSED[case]
    given = {"w": weights(*of), "b": weights(of[1] * how.get("group", 1))}
    nodes = [node("ConvTranspose", ["x", "w", "b"], **how)]
    check(tmp_path / "a.onnx", nodes, shape, given, opset=opset)


POOLS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_shape": [2, 2], "strides": [2, 2]},
    "no stride given": {"kernel_shape": [3, 2]},
    "pads": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    "lopsided": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 1, 1, 0]},
    "pads wider than half": {"kernel_shape": [3, 3], "pads": [2, 2, 2, 2]},
    "same upper": {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    "same lower": {"kernel_shape": [2, 2], "strides": [2, 1], "auto_pad": "SAME_LOWER"},
    "valid": {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "VALID"},
    "ceil": {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    "ceil with pads": {
        "kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1,
    },
    "ceil, lopsided": {
        "kernel_shape": [3, 3], "strides": [3, 3], "pads": [0, 0, 1, 1], "ceil_mode": 1,
    },
    "ceil, a window in the padding": {
        "kernel_shape": [2, 2], "strides": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("opset", [10, 12, 19, 22])
@pytest.mark.parametrize("size", [(9, 8), (7, 10)])
@pytest.mark.parametrize("case", POOLS)
def test_max_pool(case: str, size: tuple[int, int], opset: int, tmp_path: Path) -> None:
    nodes = [node("MaxPool", ["x"], **POOLS[case])]
    check(tmp_path / "a.onnx", nodes, (2, 3, *size), opset=opset)


@pytest.mark.parametrize("opset", [9, 12])
def test_max_pool_with_dilations(opset: int, tmp_path: Path) -> None:
    how = {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1]}
    if opset > 9:
        how["dilations"] = [2, 3]
    check(tmp_path / "a.onnx", [node("MaxPool", ["x"], **how)], (2, 3, 9, 8), opset=opset)


@pytest.mark.parametrize("opset", [10, 11, 19, 22])
@pytest.mark.parametrize("with_padding", [0, 1])
@pytest.mark.parametrize("size", [(9, 8), (7, 10)])
@pytest.mark.parametrize("case", POOLS)
def test_average_pool(
    case: str, size: tuple[int, int], with_padding: int, opset: int, tmp_path: Path
) -> None:
    nodes = [node("AveragePool", ["x"], count_include_pad=with_padding, **POOLS[case])]
    check(tmp_path / "a.onnx", nodes, (2, 3, *size), opset=opset)


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 5, 4), (2, 3, 5, 4, 3)])
def test_global_pools(op: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    check(tmp_path / "a.onnx", [node(op, ["x"])], shape)


ACTIVATIONS: list[tuple[str, dict[str, Any], int]] = [
    ("Relu", {}, 9), ("Sigmoid", {}, 9), ("Tanh", {}, 9), ("LeakyRelu", {}, 9),
    ("LeakyRelu", {"alpha": 0.3}, 16), ("Elu", {}, 9), ("Elu", {"alpha": 0.5}, 9),
    ("Selu", {}, 9), ("Celu", {"alpha": 2.0}, 12), ("Softplus", {}, 9), ("Softsign", {}, 9),
    ("HardSigmoid", {}, 9), ("HardSigmoid", {"alpha": 0.1666667, "beta": 0.5}, 9),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, 9), ("HardSwish", {}, 14), ("Mish", {}, 18),
    ("Gelu", {}, 20), ("Gelu", {"approximate": "tanh"}, 20), ("ThresholdedRelu", {}, 10),
    ("ThresholdedRelu", {"alpha": 0.3}, 10), ("Clip", {"min": -0.5, "max": 0.5}, 9),
    ("Clip", {"min": 0.0, "max": 6.0}, 9), ("Clip", {}, 9), ("Abs", {}, 13), ("Neg", {}, 13),
    ("Exp", {}, 13), ("Floor", {}, 13), ("Ceil", {}, 13), ("Round", {}, 11), ("Sign", {}, 9),
    ("Erf", {}, 9), ("Reciprocal", {}, 13), ("Sin", {}, 9), ("Cos", {}, 9), ("Identity", {}, 13),
    ("Dropout", {}, 9), ("Dropout", {}, 13), ("Dropout", {"ratio": 0.3}, 10),
]  # fmt: skip


@pytest.mark.parametrize(("op", "how", "opset"), ACTIVATIONS)
def test_functions_of_one_tensor(op: str, how: dict[str, Any], opset: int, tmp_path: Path) -> None:
    check(tmp_path / "a.onnx", [node(op, ["x"], **how)], (2, 3, 5, 4), opset=opset)


@pytest.mark.parametrize("op", ["Sqrt", "Log"])
def test_functions_of_positive_numbers(op: str, tmp_path: Path) -> None:
    nodes = [node("Abs", ["x"], ["a"]), node(op, ["a"])]
    check(tmp_path / "a.onnx", nodes, (2, 3, 5, 4))


@pytest.mark.parametrize("limits", [("lo", "hi"), ("lo", ""), ("", "hi"), ("hi", "lo"), ("", "")])
@pytest.mark.parametrize("opset", [11, 12, 13, 18])
def test_clip_with_limits_as_inputs(limits: tuple[str, str], opset: int, tmp_path: Path) -> None:
    given = {"lo": np.float32(-0.4), "hi": np.float32(0.7)}
    check(tmp_path / "a.onnx", [node("Clip", ["x", *limits])], (2, 3, 5), given, opset=opset)


@pytest.mark.parametrize(
    "shape", [(1,), (3, 1, 1), (1, 3, 1, 1), (4,), (5, 4), (3, 5, 4), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("opset", [9, 16])
def test_prelu(shape: tuple[int, ...], opset: int, tmp_path: Path) -> None:
    nodes, given = [node("PRelu", ["x", "s"])], {"s": weights(*shape)}
    check(tmp_path / "a.onnx", nodes, (2, 3, 5, 4), given, opset=opset)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("opset", [9, 11, 13, 18])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, 3, -1, -2])
def test_softmax(op: str, opset: int, axis: int | None, tmp_path: Path) -> None:
    how = {} if axis is None else {"axis": axis}
    if opset < 11 and axis is not None and axis < 0:
        pytest.skip("negative axes came with opset 11")
    check(tmp_path / "a.onnx", [node(op, ["x"], **how)], (2, 3, 4, 5), opset=opset)


BINARY = ["Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean"]


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (1, 3, 1, 1), (4,), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("swapped", [False, True])
def test_arithmetic_with_constants(
    op: str, shape: tuple[int, ...], swapped: bool, tmp_path: Path
) -> None:
    given = {"c": np.abs(weights(*shape)) + np.float32(0.5)}
    nodes = [node("Abs", ["x"], ["a"]), node(op, ["c", "a"] if swapped else ["a", "c"])]
    check(tmp_path / "a.onnx", nodes, (2, 3, 5, 4), given)


@pytest.mark.parametrize("op", BINARY)
def test_arithmetic_of_two_tensors(op: str, tmp_path: Path) -> None:
    nodes = [
        node("Abs", ["x"], ["a"]), node("ReduceMean", ["a"], ["m"], axes=[2]),
        node(op, ["a", "m"]),
    ]  # fmt: skip
    check(tmp_path / "a.onnx", nodes, (2, 3, 5, 4))


@pytest.mark.parametrize("op", ["Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"])
@pytest.mark.parametrize("other", ["Where", "And", "Or", "Xor", "Not"])
def test_comparisons(op: str, other: str, tmp_path: Path) -> None:
    given = {"c": np.array([0.1], np.float32), "d": np.float32(0.3)}
    ends = {
        "Where": [node("Where", ["is", "x", "d"])],
        "Not": [node("Not", ["is"], ["not"]), node("Cast", ["not"], to=TensorProto.FLOAT)],
    }
    two = [
        node("Less", ["x", "d"], ["too"]), node(other, ["is", "too"], ["both"]),
        node("Cast", ["both"], to=TensorProto.FLOAT),
    ]  # fmt: skip
    nodes = [node(op, ["x", "c"], ["is"]), *ends.get(other, two)]
    check(tmp_path / "a.onnx", nodes, (2, 3, 5), given, opset=16)


def test_casts_and_arithmetic_of_integers(tmp_path: Path) -> None:
    given = {"ten": np.array(10, np.int32), "four": np.array([4], np.int32)}
    nodes = [
        node("Mul", ["x", "f"], ["s"]), node("Cast", ["s"], ["i"], to=TensorProto.INT32),
        node("Div", ["i", "four"], ["q"]), node("Mod", ["i", "four"], ["r"]),
        node("Add", ["q", "r"], ["a"]), node("Cast", ["a"], to=TensorProto.FLOAT),
    ]  # fmt: skip
    check(tmp_path / "a.onnx", nodes, (2, 3, 5), given | {"f": np.float32(9)})


REDUCTIONS = [
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
    "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp",
]  # fmt: skip


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("opset", [9, 11, 13, 18])
@pytest.mark.parametrize("axes", [[2, 3], [1], [-1], None])
@pytest.mark.parametrize("keep", [None, 0])
def test_reductions(
    op: str, opset: int, axes: list[int] | None, keep: int | None, tmp_path: Path
) -> None:
    if axes == [-1] and opset < 11:
        pytest.skip("negative axes came with opset 11")
    how: dict[str, Any] = {} if keep is None else {"keepdims": keep}
    inputs, given = ["a"], {}
    if axes is not None and opset >= (13 if op == "ReduceSum" else 18):
        inputs, given = ["a", "axes"], {"axes": ints(*axes)}
    elif axes is not None:
        how["axes"] = axes
    nodes = [node("Abs", ["x"], ["a"]), node(op, inputs, **how)]
    check(tmp_path / "a.onnx", nodes, (2, 3, 4, 5), given, opset=opset)


@pytest.mark.parametrize("keep", [0, 1])
def test_a_reduction_of_no_axes_may_do_nothing(keep: int, tmp_path: Path) -> None:
    nodes = [node("ReduceSum", ["x"], noop_with_empty_axes=1, keepdims=keep)]
    check(tmp_path / "a.onnx", nodes, (2, 3, 4), opset=13)


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("keep", [0, 1])
def test_arg(op: str, keep: int, tmp_path: Path) -> None:
    nodes = [node(op, ["x"], axis=1, keepdims=keep)]
    check(tmp_path / "a.onnx", nodes, (2, 3, 4), out_dtype=TensorProto.INT64)
