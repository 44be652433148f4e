"""Graphs of one or two nodes in bfloat16, and what a step that rounds once makes of them."""

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from graphs import conv_graph, conv_state, inputs_of
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.cpu.weight_layout import _G
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.folded_weights import conv_weights, slope_of
from resfuse.kernels.engine.ir.graph import Conv, Graph, State, Value
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.ops.activation import ACTIVATIONS, Slope
from resfuse.kernels.ops.conv_problem import ConvProblem, dtypes_of


def in_bf16(graph: Graph) -> Graph:
    """The same graph on bfloat16 values."""
    values = {name: Value(v.shape, torch.bfloat16) for name, v in graph.values.items()}
    nodes = tuple(
        replace(node, op=replace(node.op, problem=of_bf16(node.op.problem)))
        if isinstance(node.op, Conv)
        else node
        for node in graph.nodes
    )
    return replace(graph, values=values, nodes=nodes)


def of_bf16(problem: ConvProblem) -> ConvProblem:
    return replace(problem, dtypes=dtypes_of("bf16"))


def bf16_inputs(graph: Graph) -> list[Tensor]:
    return [x.bfloat16() for x in inputs_of(graph)]


def run(graph: Graph, choice: Candidate, state: State, inputs: Sequence[Tensor]) -> Tensor:
    (y,) = Executor(graph, [choice], state)(*inputs)
    assert y.dtype == graph.values[graph.outputs[0]].dtype
    return y.clone()


def conv_exactly(graph: Graph, state: State, inputs: Sequence[Tensor], form: str) -> Tensor:
    """In fp64, the weights rounded to bfloat16 where the form rounds them: in direct ones, and
    transformed in Winograd's."""
    (node,) = graph.nodes
    op = node.op
    assert isinstance(op, Conv)
    weight, bias = conv_weights(op, state, torch.float32)
    if form == "winograd":
        return _winograd_exactly(op, state, weight, bias, inputs)
    if form == "direct":
        weight = weight.bfloat16()
    own = {**state, "exact.w": weight.double(), "exact.b": bias.double()}
    folded = replace(node, op=replace(op, weight="exact.w", bias="exact.b", norm=None))
    (want,) = eager.exact(replace(graph, nodes=(folded,)), own, inputs)
    return want


_B = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_A = ((1, 1, 1, 0), (0, 1, -1, -1))


def _winograd_exactly(
    op: Conv, state: State, weight: Tensor, bias: Tensor, inputs: Sequence[Tensor]
) -> Tensor:
    """F(2x2, 3x3) in fp64 on transformed weights in bfloat16, with the convolution's epilogue."""
    x, *added = (each.double() for each in inputs)
    problem = op.problem
    b, a, g = (torch.tensor(m, dtype=torch.float64) for m in (_B, _A, _G))
    u = torch.einsum("ir,kcrs,js->kcij", g, weight.double(), g).float().bfloat16().double()
    (above, left), p, q = problem.padding, problem.p, problem.q
    down, right = 2 * (-(-p // 2)) + 2 - problem.h - above, 2 * (-(-q // 2)) + 2 - problem.w - left
    tiles = F.pad(x, (left, right, above, down)).unfold(2, 4, 2).unfold(3, 4, 2)
    v = torch.einsum("ir,nchwrs,js->nchwij", b, tiles, b)
    groups = zip(v.chunk(problem.groups, 1), u.chunk(problem.groups), strict=True)
    m = torch.cat([torch.einsum("nchwij,kcij->nkhwij", *group) for group in groups], 1)
    y = torch.einsum("ri,nkhwij,sj->nkhrws", a, m, a).flatten(2, 3).flatten(3, 4)[:, :, :p, :q]
    y = y + bias.double()[:, None, None]
    if problem.epilogue.residual == "before":
        y = y + added[0]
    y = ACTIVATIONS[problem.activation].forward(y, _wide(slope_of(op, state)))
    return y + added[0] if problem.epilogue.residual == "after" else y


def _wide(slope: Slope) -> Slope:
    return slope.double() if isinstance(slope, Tensor) else slope


def require_rounded_once(got: Tensor, want: Tensor, slack: float) -> None:
    """Each value is what bfloat16 has nearest to a number within `slack` of the exact one."""
    want = want.double()
    reach = slack * want.abs().clamp_min(want.abs().mean())
    low, high = ((want + side * reach).float().bfloat16() for side in (-1, 1))
    wrong = ~((low <= got) & (got <= high))
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} values, the first at "
        f"{wrong.nonzero()[0].tolist()}: {float(got[wrong][0])}, exactly {float(want[wrong][0])}"
    )


def require_conv_rounded_once(problem: ConvProblem, config: NativeConfig) -> None:
    graph, state = in_bf16(conv_graph(problem)), conv_state(problem)
    inputs = bf16_inputs(graph)
    got = run(graph, Candidate("native", 0, 1, tuple(asdict(config).items())), state, inputs)
    # sums of float32 are 1e-7 to 1e-6 from fp64; a second rounding to bfloat16 would be 4e-3
    require_rounded_once(got, conv_exactly(graph, state, inputs, config.form), 2e-5)
