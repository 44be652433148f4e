"""Files from strangers: whatever is wrong with one is a sentence that names it, before any memory
is taken for it; names that Python cannot have do no harm."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_files import file_of, images, ints, node, require_equal, weights
from resfuse.kernels import load_onnx

CONV = [node("Conv", ["x", "w"], ["c"]), node("Relu", ["c"])]
WEIGHTS = {"w": weights(4, 3, 3, 3)}
SHAPE = ("n", 3, 8, 8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.onnx"


def refused(path: Path, said: str) -> None:
    with pytest.raises(ValueError, match=said) as found:
        load_onnx(path)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("content", [b"", b"\x00" * 50, b"no protobuf at all", b"PK\x03\x04..."])
def test_what_is_no_onnx_file(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    refused(path, "is no ONNX file")


def test_a_file_that_is_missing_or_truncated(path: Path, tmp_path: Path) -> None:
    refused(path, r"cannot be read: No such file")
    (tmp_path / "folder.onnx").mkdir()
    refused(tmp_path / "folder.onnx", "cannot be read: Is a directory")
    whole = file_of(path, CONV, SHAPE, WEIGHTS).read_bytes()
    for share in (0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(len(whole) * share)])
        refused(path, r"truncated|no ONNX file|holds no graph|has no output|cannot be read")


def changed(path: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(file_of(path, CONV, SHAPE, WEIGHTS))
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def external(location: str, offset: int = 0, length: int | None = None) -> Callable[..., None]:
    def change(model: onnx.ModelProto) -> None:
        (tensor,) = model.graph.initializer
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": location, "offset": offset, "length": length or size}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))

    return change


def test_external_data_is_read_from_the_files_folder(path: Path) -> None:
    data = b"1234" + WEIGHTS["w"].tobytes()
    (path.parent / "parts").mkdir()
    (path.parent / "parts" / "w.bin").write_bytes(data)
    changed(path, external("parts/w.bin", 4))
    require_equal(load_onnx(path), path, images((2, 3, 8, 8)))


@pytest.mark.parametrize(
    ("location", "offset", "length", "said"),
    [
        ("w.bin", 0, None, r"weight 'w' cannot be read: its external data 'w.bin' is missing"),
        ("../outside.bin", 0, None, "is not in the folder of the file"),
        ("/etc/hostname", 0, None, "is not in the folder of the file"),
        ("link.bin", 0, None, "is not in the folder of the file"),
        (".", 0, None, "is missing"),
        ("", 0, None, "is not in the folder of the file"),
        ("short.bin", 0, None, r"432 bytes at 0 of 'short.bin', which has 10; its shape says 432"),
        ("long.bin", -1, None, "432 bytes at -1"),
        ("long.bin", 600, None, "432 bytes at 600"),
        ("long.bin", 0, 10, "10 bytes at 0"),
    ],
)
def test_external_data_that_is_not_there(
    location: str, offset: int, length: int | None, said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(WEIGHTS["w"].tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    (folder / "short.bin").write_bytes(b"0123456789")
    (folder / "long.bin").write_bytes(b"0" * 1000)
    refused(changed(folder / "net.onnx", external(location, offset, length)), said)


def test_custom_operators(path: Path) -> None:
    nodes = [helper.make_node("Twist", ["x"], ["y"], name="a", domain="com.example")]
    refused(file_of(path, nodes, SHAPE), r"node 'a' \(com.example.Twist\) is of the domain")


@pytest.mark.parametrize("op", ["Einsum", "DynamicQuantizeLinear", "ConvInteger", "QLinearConv"])
def test_operators_that_are_not_read_are_named(op: str, path: Path) -> None:
    said = rf"node '{op}_of_y' \({op}, opset 13\) is an operator that is not read"
    refused(file_of(path, [node(op, ["x"])], SHAPE), said)


def test_dynamic_control_flow(path: Path) -> None:
    y = helper.make_tensor_value_info("b", TensorProto.FLOAT, None)
    branch = helper.make_graph([node("Relu", ["x"], ["b"])], "branch", [], [y])
    nodes = [
        node("ReduceMax", ["x"], ["m"], keepdims=0),
        node("Cast", ["m"], ["is"], to=TensorProto.BOOL),
        node("If", ["is"], then_branch=branch, else_branch=branch),
    ]
    refused(file_of(path, nodes, SHAPE), r"\(If, opset 13\) is dynamic control flow")
    for op in ("Loop", "Scan"):
        refused(file_of(path, [node(op, ["x"], body=branch)], SHAPE), "is dynamic control flow")


def test_a_branch_that_is_known_while_reading(path: Path) -> None:
    """An exporter's squeeze: taken where the dimension is one."""
    out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("b", "d")]
    squeezed = helper.make_graph([node("Squeeze", ["x", "k"], ["b"])], "then", [], out[:1],
                                 [numpy_helper.from_array(ints(2), "k")])  # fmt: skip
    same = helper.make_graph([node("Identity", ["x"], ["d"])], "else", [], out[1:])
    nodes = [
        node("Shape", ["x"], ["s"]), node("Gather", ["s", "two"], ["h"]),
        node("Equal", ["h", "one"], ["is"]),
        node("If", ["is"], ["z"], then_branch=squeezed, else_branch=same), node("Relu", ["z"]),
    ]  # fmt: skip
    given = {"two": np.int64(2), "one": np.int64(1)}
    for height in (1, 4):
        file_of(path, nodes, ("n", 3, "h", 8), given)
        require_equal(load_onnx(path, (None, 3, height, 8)), path, images((2, 3, height, 8)))
    nodes[1] = node("Gather", ["s", "none"], ["h"])  # the batch
    file_of(path, nodes, ("n", 3, 1, 8), given | {"none": np.int64(0)})
    refused(path, r"\(If, opset 13\) needs the size of the batch")


def doubled(times: int) -> list[Any]:
    return [node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(times)]


@pytest.mark.parametrize(
    ("nodes", "given"),
    [
        ([node("ConstantOfShape", ["s"], ["c"])], {"s": ints(2**40)}),
        ([node("Expand", ["one", "s"], ["c"])], {"s": ints(2**20, 2**20)}),
        ([node("Tile", ["one", "s"], ["c"])], {"s": ints(2**40)}),
        ([node("Range", ["zero", "most", "step"], ["c"])], {}),
        ([*doubled(40), node("Identity", ["c40"], ["c"])], {"c0": weights(4)}),
        ([node("Mul", ["across", "down"], ["c"])],
         {"across": weights(1, 40_000), "down": weights(40_000, 1)}),
    ],
    ids=["filled", "expanded", "tiled", "counted", "doubled", "broadcast"],
)  # fmt: skip
def test_constants_that_would_fill_the_memory(nodes: Any, given: Any, path: Path) -> None:
    given = given | {"one": weights(1), "zero": np.int64(0), "most": np.int64(2**40)}
    given["step"] = np.int64(1)
    nodes = [*nodes, node("Cast", ["c"], ["f"], to=TensorProto.FLOAT), node("Mul", ["x", "f"])]
    refused(file_of(path, nodes, SHAPE, given), r"constants of more than \d+ bytes")


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Tile", ["x", "times"])],
        [node("Expand", ["x", "shape"])],
        [node("Pad", ["x", "pads"])],
        [node("Resize", ["x", "", "", "sizes"])],
        [node("AveragePool", ["x"], kernel_shape=[3, 3], pads=[2**30] * 4)],
    ],
    ids=["tiled", "expanded", "padded", "resized", "pooled"],
)
def test_values_that_would_fill_the_memory(nodes: Any, path: Path) -> None:
    given = {
        "times": ints(1, 2**30, 1, 1), "shape": ints(2**30, 1, 3, 8, 8),
        "pads": ints(0, 0, 0, 0, 0, 0, 2**20, 2**20), "sizes": ints(1, 3, 2**31, 2**31),
    }  # fmt: skip
    refused(file_of(path, nodes, (1, 3, 8, 8), given), r"would have \d+ numbers|is not read")


def test_an_input_that_would_fill_the_memory(path: Path) -> None:
    refused(file_of(path, [node("Relu", ["x"])], (1, 3, 2**30, 2**30)), "would have")


def test_a_weight_that_says_more_than_it_holds(path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[0] = 2**40

    refused(changed(path, change), "weight 'w' cannot be read")

    def negative(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[0] = -4

    refused(changed(path, negative), "weight 'w' has a negative size")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.graph.ClearField("input"), r"it has 0 inputs \(none\); accepted: one"),
        (lambda m: m.graph.input.append(
            helper.make_tensor_value_info("x2", TensorProto.FLOAT, [1])), "2 inputs .'x', 'x2'."),
        (lambda m: m.graph.ClearField("output"), "it has no output"),
        (lambda m: m.graph.input[0].type.tensor_type.ClearField("shape"), "'x' has no shape"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.INT64),
         "'x' is of type INT64; accepted: FLOAT"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 77), "is of type 77"),
        (lambda m: setattr(m.opset_import[0], "version", 6), "operator set 6; accepted: 7 to"),
        (lambda m: setattr(m.opset_import[0], "version", 999), "operator set 999; accepted"),
        (lambda m: m.ClearField("opset_import"), "operator set none; accepted"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", TensorProto.BFLOAT16),
         "weight 'w' is of type BFLOAT16, which is not read"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", TensorProto.STRING), "type STRING"),
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "two weights are called"),
        (lambda m: m.graph.sparse_initializer.add(), "sparse weights are not read"),
        (lambda m: m.graph.node.reverse(), "reads 'c', which nothing before it computes"),
        (lambda m: m.graph.node.append(m.graph.node[1]), "'y' is computed twice"),
        (lambda m: setattr(m.graph.output[0], "name", "z"), "no node computes the output 'z'"),
        (lambda m: m.graph.node[0].ClearField("input"), r"\(Conv, opset 13\): .*missing"),
        (lambda m: m.graph.node[0].attribute.append(helper.make_attribute("winograd", 1)),
         r"\(Conv, opset 13\): the attribute winograd is not read"),
        (lambda m: m.graph.node[0].attribute.append(helper.make_attribute("strides", [1, 2, 3])),
         r"\(Conv, opset 13\): strides=\[1, 2, 3\] is not read"),
        (lambda m: m.graph.node[0].attribute.append(helper.make_attribute("strides", "two")),
         r"\(Conv, opset 13\): "),
        (lambda m: m.graph.node[0].attribute.append(helper.make_attribute("group", 3)),
         r"a weight of \[4, 3, 3, 3\] in 3 groups over 3 channels"),
        (lambda m: m.graph.node[0].attribute.append(helper.make_attribute("pads", [-1, 0, 0, 0])),
         r"pads=\[-1, 0, 0, 0\] is not read"),
        (lambda m: m.graph.node[0].attribute.append(helper.make_attribute("auto_pad", "SAME")),
         "auto_pad='SAME' is not read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(change: Callable[[Any], Any], said: str, path: Path) -> None:
    refused(changed(path, change), said)


def test_functions_of_the_file(path: Path) -> None:
    model = onnx.load(file_of(path, CONV, SHAPE, WEIGHTS))
    body = [node("Mul", ["a", "a"], ["s"]), node("Add", ["s", "a"], ["b"])]
    opsets = [helper.make_opsetid("", 13)]
    model.functions.append(helper.make_function("own", "Square", ["a"], ["b"], body, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node[1].CopyFrom(helper.make_node("Square", ["c"], ["y"], domain="own"))
    path.write_bytes(model.SerializeToString())
    require_equal(load_onnx(path), path, images((2, 3, 8, 8)))


def nested(depth: int, last: str) -> Callable[[onnx.ModelProto], None]:
    """Each function calls the next twice."""

    def change(model: onnx.ModelProto) -> None:
        opsets = [helper.make_opsetid("", 13), helper.make_opsetid("own", 1)]
        for i in range(depth):
            to = f"F{i + 1}" if i + 1 < depth else last
            domain = "own" if to[0] == "F" else ""
            ends = (["a"], ["s"]), (["s"], ["b"])
            calls = [helper.make_node(to, *each, domain=domain) for each in ends]
            model.functions.append(
                helper.make_function("own", f"F{i}", ["a"], ["b"], calls, opsets)
            )
        model.opset_import.append(helper.make_opsetid("own", 1))
        model.graph.node[1].CopyFrom(helper.make_node("F0", ["c"], ["y"], domain="own"))

    return change


def test_functions_without_end(path: Path) -> None:
    refused(changed(path, nested(40, "Relu")), "it has more than 100000 nodes")
    refused(changed(path, nested(3, "F0")), "the function 'F0' calls itself")


NAMES = [
    "self", "x", "forward", "training", "graph", "meta", "add_module", "class", "def", "1", "",
    "a.b", "a/b", "a_b", "ü", "__class__", "_modules", "getattr", "torch", "operator",
    "'); import os; ('", "a\nb", "../../etc", "Conv_1", "Conv", "weight", "0.weight",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_names_that_are_none_in_python(seed: int, path: Path) -> None:
    """As nodes, weights, values and inputs, in any order."""
    order = random.Random(seed)
    names = [name for name in NAMES if name]
    order.shuffle(names)
    x, *values = names
    nodes, given, last = [], {}, x
    for i, name in enumerate(values[:12]):
        weight = values[(i + 5) % len(values)] + "'"
        given[weight] = weights(3, 3, 1, 1, seed=i) if i % 2 else weights(1, 3, 1, 1, seed=i)
        nodes.append(
            helper.make_node("Conv" if i % 2 else "Mul", [last, weight], [name], name=values[-i])
        )
        last = name
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in given.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    require_equal(load_onnx(path), path, images((2, 3, 4, 4)), rtol=1e-4)


@pytest.mark.parametrize(
    "shape", [(1, 3, 8), (1, 3, 0, 8), (1, 3, 8, 8.0), (1, 4, 8, 8), (1, 3, -1, 8)]
)
def test_input_shapes_that_do_not_fit(shape: Any, path: Path) -> None:
    file_of(path, CONV, ("n", 3, "h", 8), WEIGHTS)
    with pytest.raises(ValueError, match=r"the input 'x' is \[\?, 3, \?, 8\], and input_shape"):
        load_onnx(path, shape)


def test_a_fixed_batch_is_not_free(path: Path) -> None:
    file_of(path, CONV, (2, 3, 8, 8), WEIGHTS)
    assert load_onnx(path).meta["batch_size"] == 2
    with pytest.raises(ValueError, match="asks for a free batch"):
        load_onnx(path, (None, 3, 8, 8))


def test_bytes_changed_at_random(path: Path) -> None:
    """Read, or refused in a sentence; nothing else."""
    nodes = [
        *CONV[:1], node("Relu", ["c"], ["r"]), node("Shape", ["r"], ["s"]),
        node("Slice", ["s", "zero", "two"], ["n"]), node("Concat", ["n", "minus"], ["to"], axis=0),
        node("Reshape", ["r", "to"], ["flat"]), node("Softmax", ["flat"], axis=-1),
    ]  # fmt: skip
    given = WEIGHTS | {"zero": ints(0), "two": ints(2), "minus": ints(-1)}
    whole = file_of(path, nodes, SHAPE, given).read_bytes()
    dice = random.Random(0)
    refusals = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(dice.choice((1, 1, 2, 8))):
            content[dice.randrange(len(content))] = dice.randrange(256)
        path.write_bytes(content)
        try:
            load_onnx(path)
        except ValueError as error:
            assert str(path) in str(error)
            refusals += 1
    assert refusals > 50
