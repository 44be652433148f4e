"""Graphs of the engine made by hand, their weights, and how right an executor of one is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import (
    Affine,
    Conv,
    Graph,
    MaxPool,
    Mean,
    Node,
    Norm,
    Operation,
    State,
    Value,
)
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.ops.conv_problem import ConvProblem
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES


def conv_graph(problem: ConvProblem) -> Graph:
    """One convolution, its batch norm, and the residual that `problem` has."""
    slope = {"prelu": "slope", "leaky_relu": 0.1}.get(problem.activation)
    op = Conv(problem, "w", "b", norm_named("norm"), slope)
    shapes = {
        "x": (problem.n, problem.c, problem.h, problem.w),
        "y": (problem.n, problem.k, problem.p, problem.q),
    }
    return one_node(op, shapes, ("x", "r") if problem.residual else ("x",))


def affine_graph(op: Affine, shape: tuple[int, ...]) -> Graph:
    return one_node(op, {"x": shape, "y": shape}, ("x", "r") if op.residual else ("x",))


def pool_graph(op: MaxPool | Mean, shape: tuple[int, ...]) -> Graph:
    x = torch.zeros(shape)
    if isinstance(op, MaxPool):
        padding = op.padding
        if op.padding_after is not None:
            (top, left), (bottom, right), padding = padding, op.padding_after, (0, 0)
            x = torch.nn.functional.pad(x, (left, right, top, bottom))
        y = torch.max_pool2d(x, op.kernel, op.stride, padding, op.dilation, op.ceil)
    else:
        y = x.mean((2, 3))
    return one_node(op, {"x": shape, "y": tuple(y.shape)}, ("x",))


def one_node(op: Operation, shapes: dict[str, tuple[int, ...]], reads: tuple[str, ...]) -> Graph:
    shapes = shapes | {name: shapes["y"] for name in reads if name not in shapes}
    values = {name: Value(shape, torch.float32) for name, shape in shapes.items()}
    return Graph("x", ("y",), (Node("y", op, reads),), values)


def norm_named(name: str) -> Norm:
    return Norm(f"{name}.mean", f"{name}.var", f"{name}.weight", f"{name}.bias", 1e-5)


def norm_state(name: str, channels: int, generator: torch.Generator) -> dict[str, Tensor]:
    """No batch norm is the identity, so that leaving one out is wrong."""
    mean, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    var, weight = (torch.rand(channels, generator=generator) + 0.5 for _ in range(2))
    return {
        f"{name}.mean": mean,
        f"{name}.var": var,
        f"{name}.weight": weight,
        f"{name}.bias": bias,
    }


def conv_state(problem: ConvProblem, seed: int = 0) -> dict[str, Tensor]:
    """What conv_graph(problem) needs; slopes of both signs."""
    generator = torch.Generator().manual_seed(seed)
    fan_in = problem.c // problem.groups * problem.r * problem.s
    shape = (problem.k, problem.c // problem.groups, problem.r, problem.s)
    return {
        "w": torch.randn(shape, generator=generator) / fan_in**0.5,
        "b": torch.randn(problem.k, generator=generator),
        "slope": torch.randn(problem.k, generator=generator),
        **norm_state("norm", problem.k, generator),
    }


def inputs_of(graph: Graph, seed: int = 1) -> list[Tensor]:
    """Random, in the order of `reads`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(graph.values[n].shape, generator=generator) for n in graph.reads]


def eager_choices(graph: Graph) -> list[Candidate]:
    return [Candidate("eager", at, at + 1) for at in range(len(graph.nodes))]


def error(got: Tensor, want: Tensor, scale: float = 0.0) -> float:
    """Relative, in norm; the norm of nothing counts as one.

    Args:
        scale: of the values rounded on the way to an element, where the result may be smaller.
    """
    got, want = got.detach().double(), want.detach().double()
    difference = (got - want).norm()
    norm = want.norm().clamp_min(scale * want.numel() ** 0.5)
    return float(difference / (norm or torch.tensor(1.0)))


def require_right(
    graph: Graph,
    executor: Executor,
    state: State,
    inputs: Sequence[Tensor],
    mode: str = "ieee",
    scale: float = 0.0,
) -> None:
    """Every output within EAGER_FACTOR of eager's own error against fp64, and a floor: the rule by
    which the engine admits tactics.
    """
    got = [y.clone() for y in executor(*inputs)]
    plain = Executor(graph, eager_choices(graph), state)(*inputs)
    for name, y, own, want in zip(
        graph.outputs, got, plain, eager.exact(graph, state, inputs), strict=True
    ):
        assert y.shape == graph.values[name].shape and y.dtype == graph.values[name].dtype
        allowed = EAGER_FACTOR * error(own, want, scale) + TOLERANCES[mode].rtol
        found = error(y, want, scale)
        assert found <= allowed, f"{name}: {found:.2e}, allowed {allowed:.2e}"
