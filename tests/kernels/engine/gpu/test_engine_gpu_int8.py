"""The graph and the tactics of an engine in int8 on a GPU, in Triton's interpreter where there is
none: bit for bit, since no activation here calls exp.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from int8_graphs import (
    Mixed,
    Quantised,
    chosen,
    images,
    quantised,
    require_its_twin,
    small_resnet,
)
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Convert,
    MaxPool,
    Mean,
    Pick,
    Torch,
)
from resfuse.kernels.engine.tactics import eager, tactics_for
from resfuse.kernels.engine.tactics.gpu import triton_int8, triton_int8_maps
from resfuse.kernels.engine.tuning.compile_ahead import launches
from resfuse.kernels.engine.tuning.exact_answers import exact_answer
from resfuse.kernels.ops.quantization import INT32_PRODUCTS
from resfuse.resnet_ref import create

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:argument images. 8 of them"),
]


@pytest.fixture(scope="module")
def resnet() -> Quantised:
    torch.manual_seed(0)
    return quantised(small_resnet(), images(2))


@pytest.fixture(scope="module")
def mixed() -> Quantised:
    torch.manual_seed(0)
    return quantised(Mixed(), images(2, size=9))


def test_a_small_resnet_is_its_twin_bit_for_bit(resnet: Quantised) -> None:
    candidates = chosen(resnet[0])
    assert {c.tactic for c in candidates} == {"int8", "int8_maps"}
    require_its_twin(resnet, candidates, images(2, seed=3))


def test_a_whole_resnet20_is_its_twin_bit_for_bit() -> None:
    """Of 32x32 images, with shortcuts that have no parameters: channels of zero points."""
    torch.manual_seed(0)
    made = quantised(create("cifar_resnet20"), images(1, size=32))
    assert any(isinstance(node.op, Pick) for node in made[0].nodes)
    require_its_twin(made, chosen(made[0]), images(1, size=32, seed=3), formats=1)


def test_what_no_kernel_takes_torch_computes(mixed: Quantised) -> None:
    graph, candidates = mixed[0], chosen(mixed[0], 0)
    by_torch = {type(graph.nodes[c.start].op) for c in candidates if c.tactic == "eager"}
    ours = {type(graph.nodes[c.start].op) for c in candidates if c.tactic != "eager"}
    assert by_torch == {Affine, Concat, Pick, Torch} and ours == {Conv, Convert, AveragePool, Mean}
    require_its_twin(mixed, candidates, images(2, size=9, seed=3))


def test_torch_alone_computes_the_same(resnet: Quantised, mixed: Quantised) -> None:
    for made, size in ((resnet, 12), (mixed, 9)):
        alone = [Candidate("eager", at, at + 1) for at in range(len(made[0].nodes))]
        require_its_twin(made, alone, images(2, size=size, seed=3))


def test_layers_to_keep_are_computed_in_float32() -> None:
    """By the tactics on float32, which take no quantised convolution, as those in int8 take no
    other."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)
    )
    graph, _, _ = quantised(model, images(1), ["2.weight"])
    offered = {
        node.op.weight: {
            name
            for name, tactic in tactics_for("cuda").items()
            if name not in ("cudnn", "native") and list(tactic.segments(graph, at))
        }
        for at, node in enumerate(graph.nodes)
        if isinstance(node.op, Conv)
    }
    assert offered["0.weight"] == offered["4.weight"] == {"int8", "eager"}
    assert "triton_conv1x1" in offered["2.weight"] and "int8" not in offered["2.weight"]


def test_a_sum_of_too_many_products_is_torchs(resnet: Quantised) -> None:
    graph = resnet[0]
    at, node = next((i, n) for i, n in enumerate(graph.nodes) if isinstance(n.op, Conv))
    assert list(triton_int8.segments(graph, at)) and list(eager.segments(graph, at))
    assert isinstance(node.op, Conv)
    problem = replace(node.op.problem, c=INT32_PRODUCTS + 1, r=1, s=1)
    large = replace(node, op=replace(node.op, problem=problem))
    nodes = (*graph.nodes[:at], large, *graph.nodes[at + 1 :])
    assert not list(triton_int8.segments(replace(graph, nodes=nodes), at))


def test_descriptors_are_for_gpus_that_have_them(
    resnet: Quantised, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, forms = resnet[0], []
    at = next(i for i, n in enumerate(graph.nodes) if isinstance(n.op, Conv) and n.residual)
    for capability in ((9, 0), (8, 0)):
        monkeypatch.setattr(triton_int8.triton_kernels, "capability", lambda graph, c=capability: c)
        forms.append({c.settings["form"] for c in triton_int8.segments(graph, at)})
    assert forms == [{"descriptors", "implicit_gemm"}, {"implicit_gemm"}]


def test_launches_are_written_down_before_there_are_weights(resnet: Quantised) -> None:
    """On meta tensors, as a build compiles them ahead: one for every candidate of ours."""
    graph, _, state = resnet
    every = [
        candidate
        for at in range(len(graph.nodes))
        for tactic in (triton_int8, triton_int8_maps)
        for candidate in tactic.segments(graph, at)
    ]
    found = list(launches(graph, state, every))
    distinct = {
        (repr(graph.nodes[c.start].op), graph.values[graph.nodes[c.start].name], c.label())
        for c in every
    }
    assert found and len(found) <= len(every) and len(found) >= 0.8 * len(distinct)
    assert {launch.kernel.__name__ for launch in found} == {
        "conv_int8_kernel", "conv1x1_int8_kernel", "convert_int8_kernel", "pool_int8_kernel"
    }  # fmt: skip


def test_a_wrong_answer_is_told(resnet: Quantised) -> None:
    """A step further than a tie, or more than a few of them, is wrong."""
    graph, _, state = resnet
    at = next(i for i, n in enumerate(graph.nodes) if isinstance(n.op, MaxPool))
    part = graph.part(at, at + 1)
    answer = exact_answer(part, state, torch.device("cpu"))
    (x,), (y,) = answer.inputs, answer.outputs
    assert x.dtype == y.dtype == torch.int8 and x.float().std() > 20
    assert answer.error_of([y]) == 0 <= answer.allowed
    assert answer.error_of([torch.where(y < 127, y + 1, y)]) > answer.allowed
    assert answer.error_of([torch.where(y < 126, y + 2, y)]) == float("inf")


@pytest.mark.parametrize("name", ["resnet", "mixed"])
def test_all_it_reads_is_on_one_device(name: str, request: pytest.FixtureRequest) -> None:
    """Of fake tensors on a GPU, whose operations fail where one is on the CPU: by torch, and by the
    tactics, whose launches are only written down."""
    graph, _, state = request.getfixturevalue(name)
    with FakeTensorMode(allow_non_fake_inputs=False) as fake, torch.inference_mode():
        there = {n: torch.empty_like(fake.from_tensor(t), device="cuda") for n, t in state.items()}
        values = {graph.input: torch.empty(graph.values[graph.input].shape, device="cuda")}
        for node in graph.nodes:
            if isinstance(node.op, Conv):  # whose weights are quantised by what they are
                made = torch.empty(graph.values[node.name].shape, device="cuda")
                values[node.name] = made.to(graph.values[node.name].dtype)
                continue
            function = eager.function_of(node, graph.values, there)
            values[node.name] = function(*(values[n] for n in node.inputs))
            assert values[node.name].device.type == "cuda", node
            assert values[node.name].dtype == graph.values[node.name].dtype, node
