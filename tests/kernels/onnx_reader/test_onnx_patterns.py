"""Layers that files spell out become torch's own, so that `fuse` and `build_engine` know them; what
only looks like them does not."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import torch
from torch import nn

from onnx_files import check, images, node, require_equal, weights
from resfuse.kernels import build_engine, explain, fuse

F32 = np.float32
GIVEN = {
    "w": weights(4, 3, 3, 3), "bias": weights(4, 1, 1), "whole": weights(1, 4, 1, 1),
    "row": weights(6), "three": F32(3), "six": np.array([6], F32), "zero": F32(0), "two": F32(2),
}  # fmt: skip
CONV = node("Conv", ["x", "w"], ["c"])
SHIFTED = node("Add", ["c", "three"], ["s"])
CLIPPED = node("Clip", ["s", "zero", "six"], ["k"])


def layers(module: nn.Module) -> list[type]:
    return [type(layer) for layer in module.children()]


@pytest.mark.parametrize(
    ("nodes", "activation"),
    [
        ([node("Sigmoid", ["c"], ["s"]), node("Mul", ["s", "c"])], nn.SiLU),
        ([node("Sigmoid", ["c"], ["s"]), node("Mul", ["c", "s"])], nn.SiLU),
        ([node("HardSigmoid", ["c"], ["s"], alpha=1 / 6), node("Mul", ["c", "s"])], nn.Hardswish),
        ([SHIFTED, CLIPPED, node("Div", ["k", "six"], ["g"]), node("Mul", ["c", "g"])],
         nn.Hardswish),
        ([SHIFTED, CLIPPED, node("Mul", ["c", "k"], ["g"]), node("Div", ["g", "six"])],
         nn.Hardswish),
    ],
)  # fmt: skip
def test_activations(nodes: Any, activation: type, tmp_path: Path) -> None:
    module = check(tmp_path / "a.onnx", [CONV, *nodes], (2, 3, 8, 8), GIVEN)
    assert layers(module) == [nn.Conv2d, activation]
    assert "1 of 1 convolutions fused" in str(explain(fuse(module)))


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Sigmoid", ["x"], ["s"]), node("Conv", ["s", "w"], ["c"]),
         node("Sigmoid", ["c"], ["g"]), node("Relu", ["c"], ["r"]), node("Mul", ["r", "g"])],
        [CONV, node("HardSigmoid", ["c"], ["s"], alpha=0.2), node("Mul", ["c", "s"])],
        [CONV, node("Add", ["c", "two"], ["s"]), CLIPPED, node("Div", ["k", "six"], ["g"]),
         node("Mul", ["c", "g"])],
        [CONV, SHIFTED, CLIPPED, node("Div", ["k", "three"], ["g"]), node("Mul", ["c", "g"])],
    ],
)  # fmt: skip
def test_what_only_looks_like_them(nodes: Any, tmp_path: Path) -> None:
    module = check(tmp_path / "a.onnx", nodes, (2, 3, 8, 8), GIVEN)
    assert not {nn.SiLU, nn.Hardswish} & set(layers(module))


@pytest.mark.parametrize("bias", ["bias", "whole"])
@pytest.mark.parametrize("twice", [False, True])
def test_a_bias_behind_a_convolution(bias: str, twice: bool, tmp_path: Path) -> None:
    nodes = [CONV, node("Add", ["c", bias], ["b"]), node("Add", ["bias", "b"], ["e"])]
    nodes = [*(nodes if twice else nodes[:2]), node("Relu", ["e" if twice else "b"])]
    module = check(tmp_path / "a.onnx", nodes, (2, 3, 8, 8), GIVEN)
    assert layers(module) == [nn.Conv2d, nn.ReLU]
    assert not any(node.op == "get_attr" for node in module.graph.nodes)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Add", ["c", "row"])],  # along the width
        [node("Add", ["c", "bias"], ["b"]), node("Mul", ["b", "c"])],  # c is read by another
    ],
)
def test_what_is_no_bias(nodes: Any, tmp_path: Path) -> None:
    module = check(tmp_path / "a.onnx", [CONV, *nodes], (2, 3, 8, 8), GIVEN)
    assert module.get_submodule("Conv_of_c").bias is None


def test_a_convolution_that_is_an_output_keeps_its_bias(tmp_path: Path) -> None:
    nodes = [CONV, node("Add", ["c", "bias"])]
    check(tmp_path / "a.onnx", nodes, (2, 3, 8, 8), GIVEN, outputs=("c", "y"))


def test_a_block_is_fused_and_built(tmp_path: Path) -> None:
    """Convolution, norm, sum and activation as one layer, and in an engine."""
    given = GIVEN | {
        "v": weights(4, 4, 3, 3), "g": weights(4), "b": weights(4), "m": weights(4),
        "var": np.abs(weights(4)) + F32(0.5),
    }  # fmt: skip
    nodes = [
        CONV, node("Relu", ["c"], ["r"]), node("Conv", ["r", "v"], ["d"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["d", "g", "b", "m", "var"], ["n"]),
        node("Add", ["n", "r"], ["a"]), node("Relu", ["a"]),
    ]  # fmt: skip
    path = tmp_path / "a.onnx"
    module = check(path, nodes, (2, 3, 8, 8), given)
    fused = fuse(module)
    assert "conv + bn + add + relu" in str(explain(fused))
    assert "2 of 2 convolutions fused" in str(explain(fused))
    x = images((2, 3, 8, 8))
    require_equal(fused, path, x)
    engine = build_engine(module, torch.from_numpy(x))
    torch.testing.assert_close(engine(torch.from_numpy(x)), module(torch.from_numpy(x)))


def test_an_engine_takes_other_batches_and_refuses_other_images(tmp_path: Path) -> None:
    module = check(tmp_path / "a.onnx", [CONV, node("Relu", ["c"])], (2, 3, 8, 8), GIVEN)
    engine = build_engine(module, torch.zeros(4, 3, 8, 8), other_batches="pad")
    x = torch.from_numpy(images((3, 3, 8, 8)))
    torch.testing.assert_close(engine(x), module(x))
    with pytest.raises(AssertionError, match=r"read for inputs of \[\?, 3, 8, 8\]"):
        fuse(module)(torch.zeros(1, 3, 9, 9))


def test_copies_know_what_they_were_read_for(tmp_path: Path) -> None:
    module = check(tmp_path / "a.onnx", [CONV, node("Relu", ["c"])], (2, 3, 8, 8), GIVEN)
    for copied in (copy.deepcopy(module), fuse(module), copy.deepcopy(module).double()):
        assert copied.meta["input_shape"] == (None, 3, 8, 8)
