"""NaN and infinity come out of native steps where torch has them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graphs import affine_graph, conv_state, error, inputs_of, norm_named, norm_state, pool_graph
from native_problems import PROBLEMS, config_of, executor_of
from resfuse.kernels.cpu.program import ACTIVATIONS
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Affine, MaxPool
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager


def awkward(x: Tensor) -> Tensor:
    """With NaN and both infinities, far apart."""
    x = x.clone()
    x[0, :, 1, 1], x[0, :, 6, 6], x[0, :, 11, 2] = float("nan"), float("inf"), -float("inf")
    return x


def require_same_awkward(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got.isnan(), want.isnan())
    infinite = want.isinf()
    assert torch.equal(got.isinf(), infinite)
    assert torch.equal(got[infinite].sign().double(), want[infinite].sign().double())
    assert error(got[want.isfinite()], want[want.isfinite()]) < 1e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["CIFAR's stem", "no whole vectors", "depthwise"])
def test_nan_and_infinity_come_out_as_torch_has_them(name: str, activation: str) -> None:
    """hardswish(-inf) is NaN in torch as well, and leaky_relu with a slope of both signs."""
    problem = replace(
        PROBLEMS[name], h=13, w=13, epilogue=PROBLEMS[name].epilogue._replace(activation=activation)
    )
    form = "grouped" if problem.groups > 1 else "direct"
    state = conv_state(problem)
    graph, executor = executor_of(problem, config_of(form, problem), state)
    inputs = [awkward(inputs_of(graph)[0])]
    (want,) = eager.exact(graph, state, inputs)
    assert want.isnan().any() and want.isfinite().any()
    require_same_awkward(executor(*inputs)[0], want)


def test_winograd_spreads_nan_no_further_than_a_patch() -> None:
    """It adds neighbours before it multiplies, so NaN reaches all of a 2x2 patch, and infinity is
    NaN there; every answer that torch has NaN or infinite is no finite number, though.
    """
    problem = replace(
        PROBLEMS["a block's 3x3"],
        h=13,
        w=13,
        epilogue=PROBLEMS["a block's 3x3"].epilogue._replace(activation="identity"),
    )
    state = conv_state(problem)
    graph, executor = executor_of(problem, config_of("winograd", problem), state)
    inputs = [awkward(inputs_of(graph)[0])]
    got, (want,) = executor(*inputs)[0], eager.exact(graph, state, inputs)
    assert not got[~want.isfinite()].isfinite().any()
    reached = torch.max_pool2d((~want.isfinite()).float(), 3, 1, 1).bool()
    assert got[~reached].isfinite().all()
    assert error(got[~reached], want[~reached]) < 1e-6


def test_a_max_pool_keeps_nan() -> None:
    graph = pool_graph(MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), (1, 32, 13, 13))
    inputs = [awkward(inputs_of(graph)[0])]
    got = Executor(graph, [Candidate("native", 0, 1)], {})(*inputs)[0]
    (want,) = eager.exact(graph, {}, inputs)
    assert want.isnan().any()
    assert torch.equal(got.double().nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
def test_a_batch_norm_and_its_activation_keep_nan(activation: str) -> None:
    state = norm_state("norm", 32, torch.Generator().manual_seed(0))
    graph = affine_graph(Affine(norm_named("norm"), activation), (1, 32, 13, 13))
    inputs = [awkward(inputs_of(graph)[0])]
    got = Executor(graph, [Candidate("native", 0, 1)], state)(*inputs)[0]
    require_same_awkward(got, eager.exact(graph, state, inputs)[0])
