"""The description of a convolution: what it is saved as, which must not change, and its cost."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from resfuse.kernels.engine.ir.graph import Conv, Graph, Node, Value
from resfuse.kernels.engine.saving.plan_json import graph_from_json, graph_to_json
from resfuse.kernels.ops.conv_problem import (
    MATH_MODES,
    QUANTIZED_MODES,
    ConvProblem,
    Dtypes,
    Epilogue,
    Geometry,
    dtypes_of,
)

GEOMETRY = Geometry((2, 1), (1, 0), (1, 2), 4)
PROBLEM = ConvProblem(2, 8, 9, 11, 16, 3, 5, GEOMETRY, Epilogue("silu", "after"), dtypes_of("bf16"))
# As saved engines of version 0.1 have it, and the subprocesses that measure layers.
PLAIN = (
    '{"n": 2, "c": 8, "h": 9, "w": 11, "k": 16, "r": 3, "s": 5, "stride": [2, 1],'
    ' "padding": [1, 0], "dilation": [1, 2], "groups": 4, "math_mode": "bf16",'
    ' "activation": "silu", "residual": true}'
)


def test_the_saved_form_is_the_one_that_older_files_have() -> None:
    assert json.dumps(PROBLEM.to_plain()) == PLAIN
    assert ConvProblem.from_plain(json.loads(PLAIN), residual_last=True) == PROBLEM
    before = replace(PROBLEM, epilogue=Epilogue("silu", "before"))
    assert ConvProblem.from_plain(json.loads(PLAIN)) == before


@pytest.mark.parametrize(
    "change",
    [{"math_mode": "fp4"}, {"math_mode": None}, {"order": 1}],
    ids=["unknown math mode", "no math mode", "a field too many"],
)
def test_what_was_never_saved_is_refused(change: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"math_mode|order"):
        ConvProblem.from_plain(json.loads(PLAIN) | change)


def graph_of(problem: ConvProblem) -> Graph:
    values = {
        name: Value(shape, problem.dtype)
        for name, shape in (("x", problem.input_shape), ("y", problem.output_shape))
    }
    return Graph("x", ("y",), (Node("y", Conv(problem, "w"), ("x", "y")),), values)


def test_a_graph_says_of_a_residual_whether_it_is_added_last() -> None:
    for place, last in (("none", False), ("before", False), ("after", True)):
        graph = graph_of(replace(PROBLEM, epilogue=Epilogue("silu", place)))
        told = json.loads(json.dumps(graph_to_json(graph)))
        (node,) = told["nodes"]
        assert list(node)[-1] == "residual_last" and node["residual_last"] is last
        assert list(node["problem"]) == list(json.loads(PLAIN))
        assert graph_from_json(told) == graph


def test_a_residual_added_last_must_be_one() -> None:
    told = graph_to_json(graph_of(replace(PROBLEM, epilogue=Epilogue("silu"))))
    told["nodes"][0]["residual_last"] = True
    with pytest.raises(ValueError, match="adds last"):
        graph_from_json(told)


@pytest.mark.parametrize("math_mode", QUANTIZED_MODES)
def test_modes_of_integers_come_back_from_their_dtypes(math_mode: str) -> None:
    assert dtypes_of(math_mode).math_mode == math_mode
    plain = replace(PROBLEM, dtypes=dtypes_of(math_mode)).to_plain()
    assert ConvProblem.from_plain(plain).dtypes == dtypes_of(math_mode)


def test_geometry_is_in_the_order_of_torch() -> None:
    x, weight = torch.zeros(PROBLEM.input_shape), torch.zeros(PROBLEM.weight_shape)
    assert F.conv2d(x, weight, None, *GEOMETRY).shape == PROBLEM.output_shape


@pytest.mark.parametrize("math_mode", MATH_MODES)
def test_a_math_mode_comes_back_from_its_dtypes(math_mode: str) -> None:
    stored, size = MATH_MODES[math_mode]
    dtypes = dtypes_of(math_mode)
    assert dtypes.math_mode == math_mode
    assert dtypes.input == dtypes.weight == dtypes.output == stored and stored.itemsize == size


def test_each_tensor_counts_with_its_own_dtype() -> None:
    """bf16 in, fp32 out: the operands are multiplied as bf16, the output is twice as large."""
    half, single = torch.bfloat16, torch.float32
    mixed = replace(PROBLEM, dtypes=Dtypes(half, half, single, single))
    assert mixed.math_mode == "bf16" and mixed.dtype == half
    outputs = 2 * 16 * PROBLEM.p * PROBLEM.q
    assert mixed.least_bytes - PROBLEM.least_bytes == 2 * outputs * 2  # y, and the residual
    assert mixed.read_bytes - PROBLEM.read_bytes == outputs * 2


def test_dtypes_that_differ_are_not_saved_as_if_they_did_not() -> None:
    mixed = dtypes_of("ieee")._replace(output=torch.bfloat16)
    with pytest.raises(ValueError, match=r"output=torch\.bfloat16"):
        replace(PROBLEM, dtypes=mixed).to_plain()
