"""What arranges, takes parts of, pads, resizes, normalises and multiplies, against ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import torch

from onnx_files import check, file_of, images, ints, node, require_equal, weights
from resfuse.kernels import load_onnx


@pytest.mark.parametrize("opset", [9, 13, 18])
@pytest.mark.parametrize("target", [(0, -1), (-1, 60), (0, 0, 20), (-1, 3, 2, 10), (0, 4, 15)])
def test_reshape_leaves_the_batch_free(target: tuple[int, ...], opset: int, tmp_path: Path) -> None:
    nodes, given = [node("Reshape", ["x", "s"])], {"s": ints(*target)}
    check(tmp_path / "a.onnx", nodes, (2, 3, 4, 5), given, opset=opset)


def test_reshape_with_a_zero_that_is_one(tmp_path: Path) -> None:
    nodes = [node("Reshape", ["x", "s"], allowzero=1)]
    with pytest.raises(ValueError, match=r"\(Reshape, opset 14\).*has no shape"):
        load_onnx(file_of(tmp_path / "a.onnx", nodes, (2, 3), {"s": ints(0, 3)}, opset=14))


@pytest.mark.parametrize("opset", [9, 13, 18])
def test_shape_arithmetic_is_done_while_reading(opset: int, tmp_path: Path) -> None:
    """As PyTorch's exporter spells x.view(x.size(0), -1) and x.view(n, 2, c // 2, h, w)."""
    axes = opset >= 13

    def wrap(name: str, to: str) -> Any:
        if axes:
            return node("Unsqueeze", [name, "zero"], [to])
        return node("Unsqueeze", [name], [to], axes=[0])

    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "i0"], ["n"], axis=0), node("Gather", ["s", "i1"], ["c"], axis=0),
        node("Div", ["c", "two"], ["half"]),
        wrap("n", "n1"), wrap("half", "h1"),
        node("Concat", ["n1", "pair", "h1", "rest"], ["to"], axis=0),
        node("Cast", ["to"], ["as_float"], to=1), node("Cast", ["as_float"], ["as_int"], to=7),
        node("Reshape", ["x", "as_int"], ["five"]),
        node("Transpose", ["five"], ["across"], perm=[0, 2, 1, 3]),
        node("Shape", ["across"], ["s2"]), node("Slice", ["s2", "a", "b"], ["first"])
        if opset > 9 else node("Slice", ["s2"], ["first"], starts=[0], ends=[1]),
        node("Concat", ["first", "minus"], ["last"], axis=0), node("Reshape", ["across", "last"]),
    ]  # fmt: skip
    given = {
        "i0": np.int64(0), "i1": np.int64(1), "two": np.int64(2), "pair": ints(2),
        "rest": ints(-1), "minus": ints(-1), "zero": ints(0), "a": ints(0), "b": ints(1),
    }  # fmt: skip
    module = check(tmp_path / "a.onnx", nodes, (2, 6, 4), given, opset=opset)
    targets = {str(n.target) for n in module.graph.nodes if n.op.startswith("call")}
    assert not any("size" in target for target in targets)


def test_a_padding_that_is_computed_of_the_image(tmp_path: Path) -> None:
    """TensorFlow's SAME, as a forward spells it: max((ceil(w / 2) - 1) * 2 + 3 - w, 0)."""
    nodes = [
        node("Shape", ["x"], ["s"]), node("Gather", ["s", "three"], ["w"], axis=0),
        node("Cast", ["w"], ["f"], to=1), node("Div", ["f", "two"], ["h"]),
        node("Ceil", ["h"], ["up"]), node("Sub", ["up", "one"], ["less"]),
        node("Mul", ["less", "two"], ["end"]), node("Add", ["end", "reach"], ["last"]),
        node("Sub", ["last", "f"], ["open"]), node("Clip", ["open", "zero"], ["missing"]),
        node("Cast", ["missing"], ["pad"], to=7), node("Unsqueeze", ["pad", "axis"], ["p"]),
        node("Concat", ["before", "p"], ["pads"], axis=0), node("Pad", ["x", "pads"]),
    ]  # fmt: skip
    given = {name: np.float32(n) for n, name in enumerate(("zero", "one", "two", "reach"))}
    given |= {"three": np.int64(3), "axis": ints(0), "before": ints(0, 0, 0, 0, 0, 0, 0)}
    for width in (7, 8):
        check(tmp_path / "a.onnx", nodes, (2, 3, 4, width), given)


def test_a_batch_that_is_needed_is_refused_or_read_for_one(tmp_path: Path) -> None:
    """A softmax over all images, written out: each image's answer depends on the others'."""
    nodes = [
        node("Shape", ["x"], ["s"]), node("Gather", ["s", "i"], ["n"], axis=0),
        node("Cast", ["n"], ["f"], to=1), node("Mul", ["x", "f"]),
    ]  # fmt: skip
    path = file_of(tmp_path / "a.onnx", nodes, ["n", 3], {"i": np.int64(0)})
    with pytest.raises(ValueError, match=r"needs the size of the batch; accepted: input_shape"):
        load_onnx(path)
    for batch in (1, 4):
        module = load_onnx(path, (batch, 3))
        assert module.meta["batch_size"] == batch
        require_equal(module, path, images((batch, 3)))
        with pytest.raises(AssertionError, match="read for inputs of"):
            module(torch.zeros(batch + 1, 3))


def test_another_size_of_image_is_refused(tmp_path: Path) -> None:
    """Its shapes were folded: a flattened [1, -1] would take any size for a batch of one."""
    nodes = [node("Shape", ["x"], ["s"]), node("Reshape", ["x", "s2"])]
    path = file_of(tmp_path / "a.onnx", nodes, [1, 3, "h", "w"], {"s2": ints(1, -1)})
    with pytest.raises(ValueError, match=r"is \[1, 3, \?, \?\]; say the sizes"):
        load_onnx(path)
    module = load_onnx(path, (1, 3, 4, 5))
    require_equal(module, path, images((1, 3, 4, 5)))
    for shape in ((2, 3, 4, 5), (1, 3, 5, 4)):
        with pytest.raises(AssertionError, match=r"read for inputs of \[1, 3, 4, 5\]"):
            module(torch.zeros(shape))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_flatten(axis: int, tmp_path: Path) -> None:
    check(tmp_path / "a.onnx", [node("Flatten", ["x"], axis=axis)], (2, 3, 4, 5), opset=11)


@pytest.mark.parametrize("perm", [None, [0, 2, 3, 1], [1, 0, 3, 2]])
def test_transpose(perm: list[int] | None, tmp_path: Path) -> None:
    how = {} if perm is None else {"perm": perm}
    check(tmp_path / "a.onnx", [node("Transpose", ["x"], **how)], (2, 3, 4, 5))


@pytest.mark.parametrize("opset", [9, 11, 13, 18])
@pytest.mark.parametrize("axes", [[1], [1, 3], [-1] * 1])
def test_squeeze_and_unsqueeze(axes: list[int], opset: int, tmp_path: Path) -> None:
    if opset < 11 and min(axes) < 0:
        pytest.skip("negative axes came with opset 11")
    inputs = ["a"] if opset >= 13 else []
    how = {} if opset >= 13 else {"axes": axes}
    nodes = [node("Squeeze", ["x", *inputs], ["s"], **how), node("Abs", ["s"], ["p"]),
             node("Unsqueeze", ["p", *inputs], **how)]  # fmt: skip
    check(tmp_path / "a.onnx", nodes, (2, 1, 4, 1), {"a": ints(*axes)}, opset=opset)


def test_a_squeeze_of_all_ones_needs_the_batch(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.onnx", [node("Squeeze", ["x"])], ["n", 3, 1])
    with pytest.raises(ValueError, match="needs the size of the batch"):
        load_onnx(path)
    for batch in (1, 2):
        require_equal(load_onnx(path, (batch, 3, 1)), path, images((batch, 3, 1)))


SLICES = [
    ([1], [3], [2], None), ([0, 1], [9, -1], [3, 2], None), ([-3], [2**63 - 1], [3], None),
    ([0], [5], [-1], [2]), ([-1], [-(2**63)], [3], [-1]), ([4], [0], [2], [-2]),
    ([-1, 0], [-100, 2], [2, 1], [-1, 1]), ([1], [1000], [1], None),
]  # fmt: skip


@pytest.mark.parametrize("opset", [9, 10, 13, 18])
@pytest.mark.parametrize("case", SLICES)
def test_slice(case: tuple[Any, ...], opset: int, tmp_path: Path) -> None:
    starts, ends, axes, steps = case
    if opset < 10:
        if steps or min(axes) < 0:
            pytest.skip("steps came with opset 10")
        nodes, given = [node("Slice", ["x"], starts=starts, ends=ends, axes=axes)], {}
    else:
        given = {"s": ints(*starts), "e": ints(*ends), "a": ints(*axes)}
        given |= {"t": ints(*steps)} if steps else {}
        nodes = [node("Slice", ["x", *given])]
    check(tmp_path / "a.onnx", nodes, (2, 3, 6, 5), given, opset=opset)


@pytest.mark.parametrize("opset", [9, 11, 13, 18])
@pytest.mark.parametrize("sizes", [None, [1, 3, 2], [2, 2, 2]])
def test_split(sizes: list[int] | None, opset: int, tmp_path: Path) -> None:
    how: dict[str, Any] = {"axis": 2}
    inputs, given = ["x"], {}
    if sizes and opset >= 13:
        inputs, given = ["x", "s"], {"s": ints(*sizes)}
    elif sizes:
        how["split"] = sizes
    elif opset >= 18:
        how["num_outputs"] = 3
    nodes = [node("Split", inputs, ["a", "b", "c"], **how), node("Concat", ["c", "a"], axis=2)]
    check(tmp_path / "a.onnx", nodes, (2, 3, 6), given, opset=opset)


def test_split_in_unequal_parts(tmp_path: Path) -> None:
    nodes = [node("Split", ["x"], ["a", "b", "c"], axis=1, num_outputs=3)]
    check(tmp_path / "a.onnx", nodes, (2, 7, 3), opset=18, outputs=("a", "b", "c"))


@pytest.mark.parametrize(
    "index", [np.int64(1), np.int64(-1), ints(2, 0, -1), ints(0, 1, -1, 2).reshape(2, 2)]
)
@pytest.mark.parametrize("axis", [1, 2, -1])
def test_gather(index: np.ndarray, axis: int, tmp_path: Path) -> None:
    check(tmp_path / "a.onnx", [node("Gather", ["x", "i"], axis=axis)], (2, 3, 4, 5), {"i": index})


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (3, 4, 1), (1, 1, 1, 1), (2, 1, 1, 1, 1)])
def test_expand(shape: tuple[int, ...], tmp_path: Path) -> None:
    nodes = [node("Expand", ["x", "s"])]
    check(tmp_path / "a.onnx", nodes, (2, 3, 4, 1), {"s": ints(*shape)})


def test_tile(tmp_path: Path) -> None:
    check(tmp_path / "a.onnx", [node("Tile", ["x", "t"])], (2, 3, 4), {"t": ints(1, 2, 3)})


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_and_back(mode: str, tmp_path: Path) -> None:
    nodes = [node("DepthToSpace", ["x"], blocksize=2, mode=mode)]
    check(tmp_path / "a.onnx", nodes, (2, 8, 3, 4))
    nodes = [node("SpaceToDepth", ["x"], blocksize=2)]
    check(tmp_path / "b.onnx", nodes, (2, 2, 6, 4))


@pytest.mark.parametrize("opset", [9, 11, 13, 18, 19])
@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize(
    "pads", [[0, 0, 1, 2, 0, 0, 3, 0], [0, 0, 0, 1, 0, 0, 0, 1], [0, 1, 0, 0, 0, 2, 1, 0]]
)
def test_pad(mode: str, pads: list[int], opset: int, tmp_path: Path) -> None:
    if mode == "wrap" and opset < 19:
        pytest.skip("wrap came with opset 19")
    if mode != "constant" and pads[1]:
        path = file_of(
            tmp_path / "a.onnx", [node("Pad", ["x"], pads=pads, mode=mode)], (2, 3, 5, 6), opset=9
        )
        with pytest.raises(ValueError, match=f"mode='{mode}' with pads.*is not read"):
            load_onnx(path)
        return
    if opset < 11:
        nodes, given = [node("Pad", ["x"], pads=pads, mode=mode, value=0.5)], {}
    else:
        given = {"p": ints(*pads), "v": np.float32(0.5)}
        nodes = [node("Pad", ["x", *given], mode=mode)]
    check(tmp_path / "a.onnx", nodes, (2, 3, 5, 6), given, opset=opset)


def test_pad_along_axes_and_negative_pads(tmp_path: Path) -> None:
    given = {"p": ints(1, -1, 2, 1), "a": ints(-1, 2)}
    nodes = [node("Pad", ["x", "p", "", "a"])]
    check(tmp_path / "a.onnx", nodes, (2, 3, 5, 6), given, opset=18)


@pytest.mark.parametrize("opset", [11, 13, 18, 19])
@pytest.mark.parametrize("how", ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"])
@pytest.mark.parametrize("rule", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
@pytest.mark.parametrize("scales", [(2.0, 2.0), (2.0, 3.0), (0.5, 0.6), (1.7, 1.3)])
def test_resize_to_the_nearest(
    scales: tuple[float, float], rule: str, how: str, opset: int, tmp_path: Path
) -> None:
    nodes = [node("Resize", ["x", "", "s"], mode="nearest", nearest_mode=rule,
                  coordinate_transformation_mode=how)]  # fmt: skip
    if opset < 13:
        nodes[0].input[1] = "roi"
    given = {"s": np.array([1, 1, *scales], np.float32), "roi": np.zeros(0, np.float32)}
    check(tmp_path / "a.onnx", nodes, (2, 3, 5, 7), given, opset=opset)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("how", ["half_pixel", "pytorch_half_pixel", "align_corners"])
@pytest.mark.parametrize("scales", [(2.0, 2.0), (0.5, 0.6), (1.7, 1.3), (1.0, 3.0)])
@pytest.mark.parametrize("by", ["scales", "sizes"])
def test_resize_by_interpolation(
    by: str, scales: tuple[float, float], how: str, mode: str, tmp_path: Path
) -> None:
    shape = (2, 3, 5, 7)
    nodes = [node("Resize", ["x", "", "s"] if by == "scales" else ["x", "", "", "s"], mode=mode,
                  coordinate_transformation_mode=how)]  # fmt: skip
    if by == "scales":
        given = {"s": np.array([1, 1, *scales], np.float32)}
        check(tmp_path / "a.onnx", nodes, shape, given, opset=13)
    else:
        sizes = [int(size * scale) for size, scale in zip(shape[2:], scales, strict=True)]
        given = {"s": ints(2, 3, *sizes)}
        path = file_of(tmp_path / "a.onnx", nodes, shape, given)
        require_equal(load_onnx(path), path, images(shape))


def test_resize_along_axes(tmp_path: Path) -> None:
    nodes = [node("Resize", ["x", "", "", "s"], mode="linear", axes=[2, 3])]
    check(tmp_path / "a.onnx", nodes, (2, 3, 5, 7), {"s": ints(10, 9)}, opset=18)


@pytest.mark.parametrize(
    "how",
    [
        {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
        {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"},
        {"mode": "nearest", "coordinate_transformation_mode": "tf_crop_and_resize"},
        {"mode": "cubic", "cubic_coeff_a": -0.5},
        {"mode": "linear", "antialias": 1},
    ],
)
def test_resizes_that_torch_computes_otherwise_are_refused(
    how: dict[str, Any], tmp_path: Path
) -> None:
    given = {"s": np.array([1, 1, 2, 2], np.float32)}
    path = file_of(
        tmp_path / "a.onnx", [node("Resize", ["x", "", "s"], **how)], (1, 2, 4, 4), given, opset=18
    )
    with pytest.raises(ValueError, match=r"\(Resize, opset 18\): .*is not read"):
        load_onnx(path)


@pytest.mark.parametrize(("op", "opset"), [("Upsample", 9), ("Resize", 10)])
def test_upsampling_of_old(op: str, opset: int, tmp_path: Path) -> None:
    given = {"s": np.array([1, 1, 2, 3], np.float32)}
    check(tmp_path / "a.onnx", [node(op, ["x", "s"])], (2, 3, 4, 5), given, opset=opset)


@pytest.mark.parametrize("opset", [9, 13, 15, 18])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 5, 4), (2, 3, 2, 3, 2)])
def test_batch_norm(shape: tuple[int, ...], opset: int, tmp_path: Path) -> None:
    given = {"s": weights(3), "b": weights(3, seed=2), "m": weights(3, seed=3)}
    given["v"] = np.abs(weights(3, seed=4)) + np.float32(0.1)
    nodes = [node("BatchNormalization", ["x", *given], epsilon=0.01)]
    check(tmp_path / "a.onnx", nodes, shape, given, opset=opset)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 5, 4)])
def test_instance_norm(shape: tuple[int, ...], tmp_path: Path) -> None:
    given = {"s": weights(3), "b": weights(3, seed=2)}
    nodes = [node("InstanceNormalization", ["x", *given], epsilon=0.01)]
    check(tmp_path / "a.onnx", nodes, shape, given)


@pytest.mark.parametrize(("axis", "of"), [(-1, (4,)), (2, (5, 4))])
@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm(axis: int, of: tuple[int, ...], with_bias: bool, tmp_path: Path) -> None:
    given = {"s": weights(*of)} | ({"b": weights(*of, seed=2)} if with_bias else {})
    nodes = [node("LayerNormalization", ["x", *given], axis=axis)]
    check(tmp_path / "a.onnx", nodes, (2, 3, 5, 4), given, opset=17)


def test_group_norm(tmp_path: Path) -> None:
    given = {"s": weights(4), "b": weights(4, seed=2)}
    nodes = [node("GroupNormalization", ["x", *given], num_groups=2)]
    check(tmp_path / "a.onnx", nodes, (2, 4, 5, 3), given, opset=21)


def test_local_response_norm(tmp_path: Path) -> None:
    nodes = [node("LRN", ["x"], size=5, alpha=0.1, beta=0.6, bias=2.0)]
    check(tmp_path / "a.onnx", nodes, (2, 7, 3, 4))


@pytest.mark.parametrize("p", [1, 2])
def test_lp_norm(p: int, tmp_path: Path) -> None:
    check(tmp_path / "a.onnx", [node("LpNormalization", ["x"], p=p, axis=1)], (2, 7, 3))


@pytest.mark.parametrize("across", [0, 1])
@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("bias", [None, (), (1,), (4,), (1, 4), (3, 1), (3, 4)])
def test_gemm(
    across: int, along: int, alpha: float, beta: float, bias: tuple[int, ...] | None, tmp_path: Path
) -> None:
    given = {"b": weights(4, 5) if along else weights(5, 4)}
    given |= {} if bias is None else {"c": weights(*bias)}
    how = {"transA": across, "transB": along, "alpha": alpha, "beta": beta}
    shape = (5, 3) if across else (3, 5)
    path = file_of(tmp_path / "a.onnx", [node("Gemm", ["x", *given], **how)], shape, given)
    require_equal(load_onnx(path), path, images(shape))


def test_a_gemm_with_a_bias_for_each_row(tmp_path: Path) -> None:
    """[3, 1] beside three features: not one for each feature."""
    given = {"b": weights(5, 3), "c": weights(3, 1)}
    path = file_of(tmp_path / "a.onnx", [node("Gemm", ["x", "b", "c"])], (3, 5), given)
    require_equal(load_onnx(path), path, images((3, 5)))


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_matmul(shape: tuple[int, ...], with_bias: bool, tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Add", ["b", "m"])]
    given = {"w": weights(5, 4), "b": weights(4)}
    module = check(tmp_path / "a.onnx", nodes if with_bias else [node("MatMul", ["x", "w"])],
                   shape, given)  # fmt: skip
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    assert [layer.bias is not None for layer in layers] == [with_bias]


def test_matmul_of_two_tensors(tmp_path: Path) -> None:
    nodes = [node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), node("MatMul", ["t", "x"])]
    check(tmp_path / "a.onnx", nodes, (2, 3, 5))


def test_several_outputs_come_in_the_files_order(tmp_path: Path) -> None:
    nodes = [node("Relu", ["x"], ["b"]), node("Neg", ["x"], ["a"])]
    check(tmp_path / "a.onnx", nodes, (2, 3), outputs=("b", "a", "b"))
