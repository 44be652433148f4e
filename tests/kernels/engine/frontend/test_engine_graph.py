"""Graphs: merging keeps what is computed, JSON keeps everything, and keys tell parts apart."""

import json
from dataclasses import replace

import torch
from hypothesis import given, settings
from torch import Tensor

from graphs import conv_graph, error, inputs_of
from random_graphs import State, graphs
from resfuse.kernels.engine.frontend.merge import merge
from resfuse.kernels.engine.ir.candidate import key_of
from resfuse.kernels.engine.ir.graph import Affine, Conv, Graph, GroupNorm, Node, Norm, Value
from resfuse.kernels.engine.saving.plan_json import graph_from_json, graph_to_json
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of

PROBLEM = ConvProblem(1, 16, 4, 4, 16, 1, 1, epilogue=Epilogue(), dtypes=dtypes_of("ieee"))
NORM = Norm("mean", "var", None, None, 1e-5)


def exact(graph: Graph, state: State, inputs: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(graph.outputs, eager.exact(graph, state, inputs), strict=True))


@settings(max_examples=1000)
@given(made=graphs(elementary=True, torch_nodes=True))
def test_merging_changes_no_answer(made: tuple[Graph, State]) -> None:
    graph, state = made
    merged = merge(graph)
    assert len(merged.nodes) <= len(graph.nodes)
    inputs = inputs_of(graph)
    before, after = exact(graph, state, inputs), exact(merged, state, inputs)
    assert list(after) == list(before)
    for name, want in before.items():
        assert error(after[name], want) < 1e-10, f"{name}: {graph.nodes} -> {merged.nodes}"


def chain(*nodes: Node, outputs: tuple[str, ...] | None = None) -> Graph:
    values = dict.fromkeys(["x", *(n.name for n in nodes)], Value((1, 16, 4, 4), torch.float32))
    return Graph("x", outputs or (nodes[-1].name,), nodes, values)


def test_a_convolution_takes_in_norm_sum_and_activation() -> None:
    (only,) = merge(
        chain(
            Node("conv", Conv(PROBLEM, "w"), ("x",)),
            Node("norm", Affine(NORM), ("conv",)),
            Node("sum", Affine(residual=True), ("norm", "x")),
            Node("relu", Affine(None, "relu"), ("sum",)),
        )
    ).nodes
    problem = replace(PROBLEM, epilogue=Epilogue("relu", "before"))
    assert only == Node("relu", Conv(problem, "w", norm=NORM), ("x", "x"))


def test_what_somebody_else_reads_is_left_alone() -> None:
    graph = chain(
        Node("conv", Conv(PROBLEM, "w"), ("x",)),
        Node("relu", Affine(None, "relu"), ("conv",)),
        outputs=("conv", "relu"),
    )
    assert merge(graph).nodes == graph.nodes


def test_a_sum_goes_to_the_branch_whose_input_is_its_own() -> None:
    """Not to the projection: its input is the block's."""
    merged = merge(
        chain(
            Node("conv1", Conv(PROBLEM, "w1"), ("x",)),
            Node("conv2", Conv(PROBLEM, "w2"), ("conv1",)),
            Node("projection", Conv(PROBLEM, "w3"), ("x",)),
            Node("sum", Affine(residual=True), ("conv2", "projection")),
        )
    )
    assert [node.inputs for node in merged.nodes] == [("x",), ("x",), ("conv1", "projection")]


def test_a_norm_plus_a_convolution_is_not_the_norm_of_the_convolution() -> None:
    """The sum goes to the norm, the last of the two; what then has a norm and a sum is done."""
    graph = chain(
        Node("conv", Conv(PROBLEM, "w"), ("x",)),
        Node("norm", Affine(NORM), ("x",)),
        Node("sum", Affine(residual=True), ("norm", "conv")),
    )
    first, second = merge(graph).nodes
    assert first == graph.nodes[0]
    assert second == Node("sum", Affine(NORM, residual=True), ("x", "conv"))


def test_an_activation_plus_a_convolution_is_not_the_convolution_plus_its_input() -> None:
    graph = chain(
        Node("conv", Conv(PROBLEM, "w"), ("x",)),
        Node("relu", Affine(None, "relu"), ("x",)),
        Node("sum", Affine(residual=True), ("relu", "conv")),
    )
    first, second = merge(graph).nodes
    assert first == graph.nodes[0]
    assert second.op == Affine(None, "relu", None, True, True)


def test_nodes_nobody_reads_are_gone() -> None:
    graph = chain(
        Node("unread", Conv(PROBLEM, "w"), ("x",)), Node("read", Affine(None, "relu"), ("x",))
    )
    assert [node.name for node in merge(graph).nodes] == ["read"]


@settings(max_examples=100)
@given(made=graphs(torch_nodes=True))
def test_json_keeps_everything(made: tuple[Graph, State]) -> None:
    graph, _ = made
    assert graph_from_json(json.loads(json.dumps(graph_to_json(graph)))) == graph


CHANGES = {
    "n": 2, "c": 32, "h": 9, "w": 9, "k": 32, "r": 1, "s": 1, "groups": 2, "math_mode": "bf16",
    "stride": (2, 2), "padding": (0, 0), "dilation": (2, 2), "activation": "relu", "residual": True,
}  # fmt: skip
ONE_WAY = [
    (name, pair)
    for name in ("stride", "padding", "dilation")
    for pair in ((1, 2), (2, 1), (1, 0))
    if name == "padding" or 0 not in pair
]


def test_different_convolutions_have_different_keys() -> None:
    """A time of one must not be taken for the other's."""
    geometry = Geometry(padding=(1, 1))
    base = ConvProblem(1, 16, 8, 8, 16, 3, 3, geometry, Epilogue(), dtypes_of("ieee"))
    changes = [dict([change]) for change in (*CHANGES.items(), *ONE_WAY)]
    problems = {base, *(ConvProblem.from_plain(base.to_plain() | change) for change in changes)}
    problems.add(replace(base, epilogue=Epilogue("identity", "after")))
    assert len({key_of(conv_graph(problem)) for problem in problems}) == len(problems)


def test_different_group_norms_have_different_keys() -> None:
    """But not those whose weights have other names."""
    base = GroupNorm(4, "w", "b", 1e-5)
    changes = {"groups": 2, "weight": None, "bias": None, "activation": "relu"}
    others = [replace(base, **{name: value}) for name, value in changes.items()]  # type: ignore[arg-type]
    others += [base.with_residual(), others[-1].with_residual()]

    def key(op: GroupNorm) -> str:
        return key_of(chain(Node("y", op, ("x", "x") if op.residual else ("x",))))

    assert len({key(op) for op in (base, *others)}) == 1 + len(others)
    assert key(replace(base, weight="v", bias="c")) == key(base)


def test_a_group_norm_takes_in_sum_and_activation_but_no_norm() -> None:
    norm = GroupNorm(4, "w", "b", 1e-5)
    nodes = merge(
        chain(
            Node("groups", norm, ("x",)),
            Node("relu", Affine(None, "relu"), ("groups",)),
            Node("sum", Affine(residual=True), ("relu", "x")),
            Node("again", norm, ("sum",)),
            Node("norm", Affine(NORM), ("again",)),
        )
    ).nodes
    taken = norm.with_activation("relu", None).with_residual()
    assert taken.residual_last
    assert nodes == (
        Node("sum", taken, ("x", "x")), Node("again", norm, ("sum",)),
        Node("norm", Affine(NORM), ("again",)),
    )  # fmt: skip


def test_keys_do_not_depend_on_names() -> None:
    graph = conv_graph(replace(PROBLEM, epilogue=PROBLEM.epilogue._replace(residual="before")))
    (node,) = graph.nodes
    names = {"x": "a", "r": "b", "y": "c"}
    assert isinstance(node.op, Conv)
    renamed = Graph(
        "a",
        ("c",),
        (Node("c", replace(node.op, weight="other"), ("a", "b")),),
        {names[name]: value for name, value in graph.values.items()},
    )
    assert key_of(renamed) == key_of(graph)
