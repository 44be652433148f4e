"""Graphs of one or two nodes in bfloat16, and what a step that rounds once makes of them."""

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from graphs import conv_graph, conv_state, inputs_of
from resfuse.kernels.cpu.conv_candidates import NativeConfig
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.folded_weights import conv_weights
from resfuse.kernels.engine.ir.graph import Conv, Graph, State, Value
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager
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
    """In fp64, the weights rounded to bfloat16 where the form rounds them: in direct ones alone."""
    (node,) = graph.nodes
    op = node.op
    assert isinstance(op, Conv)
    weight, bias = conv_weights(op, state, torch.float32)
    if form == "direct":
        weight = weight.bfloat16()
    own = {**state, "exact.w": weight.double(), "exact.b": bias.double()}
    folded = replace(node, op=replace(op, weight="exact.w", bias="exact.b", norm=None))
    (want,) = eager.exact(replace(graph, nodes=(folded,)), own, inputs)
    return want


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
